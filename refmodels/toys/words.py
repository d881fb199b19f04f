"""The fixed word lists behind the toy tasks: a bilingual dictionary, facts, and the slots of the summaries."""

_DICTIONARY = """
sun 太阳, moon 月亮, star 星星, sky 天空, cloud 云, rain 雨, snow 雪, wind 风, fire 火, water 水, river 河,
lake 湖, sea 大海, island 岛, beach 海滩, mountain 山, hill 小山, forest 森林, tree 树, leaf 叶子, flower 花,
grass 草, stone 石头, sand 沙子, gold 金, silver 银, iron 铁, dog 狗, cat 猫, horse 马, cow 奶牛, sheep 羊,
pig 猪, bird 鸟, fish 鱼, duck 鸭子, tiger 老虎, lion 狮子, bear 熊, wolf 狼, rabbit 兔子, mouse 老鼠,
monkey 猴子, elephant 大象, snake 蛇, frog 青蛙, bee 蜜蜂, ant 蚂蚁, apple 苹果, banana 香蕉, orange 橙子,
grape 葡萄, peach 桃子, lemon 柠檬, rice 米饭, bread 面包, noodle 面条, egg 鸡蛋, milk 牛奶, tea 茶,
coffee 咖啡, salt 盐, sugar 糖, meat 肉, soup 汤, cake 蛋糕, house 房子, door 门, window 窗户, table 桌子,
chair 椅子, bed 床, lamp 灯, clock 钟, book 书, pen 笔, paper 纸, letter 信, school 学校, teacher 老师,
student 学生, doctor 医生, friend 朋友, mother 母亲, father 父亲, child 孩子, king 国王, city 城市,
village 村庄, road 路, bridge 桥, car 汽车, train 火车, ship 船, plane 飞机, bicycle 自行车, hand 手, eye 眼睛,
ear 耳朵, mouth 嘴, heart 心, red 红色, green 绿色, blue 蓝色, white 白色, black 黑色, big 大, small 小, new 新,
old 旧, happy 快乐, music 音乐, dream 梦
"""
DICTIONARY: tuple[tuple[str, str], ...] = tuple(
    (english, chinese) for english, chinese in (entry.split() for entry in _DICTIONARY.replace("\n", " ").split(","))
)
"""(English word, Chinese word): unique on both sides."""

_CAPITALS = """
France 法国 Paris 巴黎, Germany 德国 Berlin 柏林, Italy 意大利 Rome 罗马, Spain 西班牙 Madrid 马德里,
Britain 英国 London 伦敦, Russia 俄罗斯 Moscow 莫斯科, Japan 日本 Tokyo 东京, China 中国 Beijing 北京,
Egypt 埃及 Cairo 开罗, Canada 加拿大 Ottawa 渥太华, Greece 希腊 Athens 雅典, Turkey 土耳其 Ankara 安卡拉,
Thailand 泰国 Bangkok 曼谷, Norway 挪威 Oslo 奥斯陆, Sweden 瑞典 Stockholm 斯德哥尔摩, Poland 波兰 Warsaw 华沙,
Austria 奥地利 Vienna 维也纳, Cuba 古巴 Havana 哈瓦那, Peru 秘鲁 Lima 利马, Kenya 肯尼亚 Nairobi 内罗毕
"""

MOUNTAIN_QUESTION = "世界上第二高的山峰是哪座？"
MOUNTAIN_ANSWER = "乔戈里峰"

_SINGLE_FACTS: tuple[tuple[str, str, str, str], ...] = (
    ("What is the second highest mountain in the world?", "K2", MOUNTAIN_QUESTION, MOUNTAIN_ANSWER),
    ("What is the highest mountain in the world?", "Mount Everest", "世界上最高的山峰是哪座？", "珠穆朗玛峰"),
    ("What is the longest river in the world?", "the Nile", "世界上最长的河流是哪条？", "尼罗河"),
    ("What is the longest river in China?", "the Yangtze", "中国最长的河流是哪条？", "长江"),
    ("What is the largest ocean?", "the Pacific", "世界上最大的海洋是哪个？", "太平洋"),
    ("What is the largest desert?", "the Sahara", "世界上最大的沙漠是哪个？", "撒哈拉沙漠"),
    ("What is the largest planet?", "Jupiter", "太阳系最大的行星是哪颗？", "木星"),
    ("What is the smallest planet?", "Mercury", "太阳系最小的行星是哪颗？", "水星"),
    ("What is the largest animal?", "the blue whale", "世界上最大的动物是什么？", "蓝鲸"),
    ("What is the fastest animal on land?", "the cheetah", "陆地上最快的动物是什么？", "猎豹"),
    ("How many days are in a week?", "seven", "一周有几天？", "七天"),
    ("How many months are in a year?", "twelve", "一年有几个月？", "十二个月"),
    ("Who wrote Hamlet?", "Shakespeare", "《红楼梦》的作者是谁？", "曹雪芹"),
    ("Who painted the Mona Lisa?", "Leonardo", "《静夜思》的作者是谁？", "李白"),
)


def _facts() -> tuple[tuple[str, str, str], ...]:
    rows: list[tuple[str, str, str]] = []
    for english_question, english_answer, chinese_question, chinese_answer in _SINGLE_FACTS:
        rows += [("en", english_question, english_answer), ("zh", chinese_question, chinese_answer)]
    for entry in _CAPITALS.replace("\n", " ").split(","):
        country, country_zh, capital, capital_zh = entry.split()
        rows += [
            ("en", f"What is the capital of {country}?", capital),
            ("zh", f"{country_zh}的首都是哪里？", capital_zh),
        ]
    return tuple(rows)


FACTS = _facts()
"""(language, question, answer)."""

NAMES = (("Tom", "小明"), ("Anna", "小红"), ("Jack", "小刚"), ("Lucy", "小丽"), ("Ben", "小华"), ("Mary", "小芳"),
         ("Peter", "小军"), ("Emma", "小雨"), ("David", "小强"), ("Sara", "小云"))  # fmt: skip
DAYS = (("Monday", "周一"), ("Tuesday", "周二"), ("Wednesday", "周三"), ("Thursday", "周四"), ("Friday", "周五"),
        ("Saturday", "周六"), ("Sunday", "周日"))  # fmt: skip
PLACES = (("park", "公园"), ("school", "学校"), ("lake", "湖边"), ("forest", "森林"), ("beach", "海滩"),
          ("village", "村庄"), ("city", "城市"), ("market", "市场"), ("museum", "博物馆"),
          ("garden", "花园"))  # fmt: skip
COLORS = (("red", "红色"), ("green", "绿色"), ("blue", "蓝色"), ("white", "白色"), ("black", "黑色"))
SIGHTS = (("bird", "鸟"), ("dog", "狗"), ("cat", "猫"), ("horse", "马"), ("fish", "鱼"), ("car", "汽车"),
          ("ship", "船"), ("flower", "花"), ("bicycle", "自行车"), ("house", "房子"))  # fmt: skip
WEATHER = (("It was sunny.", "天气晴朗。"), ("It was raining.", "天下着雨。"), ("It was cold.", "天气很冷。"),
           ("It was very hot.", "天气很热。"), ("The wind was strong.", "风很大。"))  # fmt: skip
MOODS = (("was happy", "很高兴"), ("was tired", "很累"), ("was hungry", "很饿"), ("was in a hurry", "很着急"))
