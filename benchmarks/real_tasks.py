"""The prompts of benchmarks/real_model.py, and small Python functions to complete, with a solution and asserts."""

from __future__ import annotations

from typing import NamedTuple

CHAT = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain recursion to a child in two sentences.",
    "世界上最高的山是哪座？",
    "Translate into German: I would like a cup of coffee.",
    "Which is larger, 17 times 3 or 7 times 8?",
    "Write a Python one-liner that sums the squares of a list.",
    "What does the SQL keyword GROUP BY do?",
    "Name three prime numbers between 20 and 40.",
    "写一个函数，用 Python 判断一个数是不是偶数。",
)
CODE = (
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    "// A function that reverses a string\nfunction reverse(text) {\n",
    "SELECT name, COUNT(*) FROM orders\nWHERE ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "#include <stdio.h>\n\nint main(void) {\n",
    "# Read a CSV file and print the mean of every column\nimport csv\n",
    "The three laws of thermodynamics are",
    'def is_palindrome(text: str) -> bool:\n    """Whether the text reads the same backwards."""\n',
    "for i in range(1, 101):\n    if i % 15 == 0:\n",
)


class Task(NamedTuple):
    """A function: what the model sees, a body that is right, and asserts that tell."""

    prompt: str
    solution: str
    tests: str


def _task(signature: str, says: str, solution: str, *tests: str) -> Task:
    body = "".join(f"    {line}\n" for line in solution.splitlines())
    return Task(f'def {signature}:\n    """{says}"""\n', body, "\n".join(f"assert {test}" for test in tests))


TASKS = (
    _task("add(a, b)", "Return the sum of a and b.", "return a + b", "add(2, 3) == 5", "add(-1, 1) == 0"),
    _task(
        "is_even(n)",
        "Return True if n is even, else False.",
        "return n % 2 == 0",
        "is_even(4) is True",
        "is_even(7) is False",
    ),
    _task(
        "factorial(n)",
        "Return n!, the product of all integers from 1 to n; factorial(0) is 1.",
        "result = 1\nfor i in range(2, n + 1):\n    result *= i\nreturn result",
        "factorial(0) == 1",
        "factorial(5) == 120",
    ),
    _task(
        "reverse_words(text)",
        "Return the words of the text in reverse order, joined by single spaces.",
        'return " ".join(reversed(text.split()))',
        "reverse_words('a b c') == 'c b a'",
        "reverse_words('one') == 'one'",
    ),
    _task(
        "count_vowels(text)",
        "Return how many of the letters a, e, i, o, u are in the text, in upper or lower case.",
        'return sum(c in "aeiou" for c in text.lower())',
        "count_vowels('Education') == 5",
        "count_vowels('xyz') == 0",
    ),
    _task(
        "maximum(numbers)",
        "Return the largest number of a list without using max; None if the list is empty.",
        "best = None\nfor n in numbers:\n    if best is None or n > best:\n        best = n\nreturn best",
        "maximum([1, 9, 3]) == 9",
        "maximum([-5, -2]) == -2",
        "maximum([]) is None",
    ),
    _task(
        "unique(items)",
        "Return the items of a list without repetitions, in the order of their first appearance.",
        "return list(dict.fromkeys(items))",
        "unique([3, 1, 3, 2, 1]) == [3, 1, 2]",
        "unique([]) == []",
    ),
    _task(
        "gcd(a, b)",
        "Return the greatest common divisor of a and b.",
        "while b:\n    a, b = b, a % b\nreturn a",
        "gcd(12, 18) == 6",
        "gcd(7, 5) == 1",
        "gcd(10, 0) == 10",
    ),
    _task(
        "is_prime(n)",
        "Return True if n is a prime number, else False.",
        "return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))",
        "is_prime(2)",
        "is_prime(97)",
        "not is_prime(1)",
        "not is_prime(91)",
    ),
    _task(
        "flatten(lists)",
        "Return one list with all items of a list of lists, in order.",
        "return [item for each in lists for item in each]",
        "flatten([[1, 2], [], [3]]) == [1, 2, 3]",
        "flatten([]) == []",
    ),
    _task(
        "caesar(text, shift)",
        "Shift every lower-case letter of the text by shift places in the alphabet, after z comes a; "
        "leave other characters as they are.",
        'return "".join(chr((ord(c) - 97 + shift) % 26 + 97) if "a" <= c <= "z" else c for c in text)',
        "caesar('abz', 1) == 'bca'",
        "caesar('a b!', 2) == 'c d!'",
    ),
    _task(
        "transpose(matrix)",
        "Return the transpose of a matrix that is a list of rows, as a list of lists.",
        "return [list(column) for column in zip(*matrix)]",
        "transpose([[1, 2], [3, 4], [5, 6]]) == [[1, 3, 5], [2, 4, 6]]",
    ),
    _task(
        "digits_sum(n)",
        "Return the sum of the decimal digits of a non-negative integer.",
        "return sum(int(d) for d in str(n))",
        "digits_sum(0) == 0",
        "digits_sum(9081) == 18",
    ),
    _task(
        "count_words(text)",
        "Return a dict from every word of the text to the number of times it appears.",
        "counts = {}\nfor word in text.split():\n    counts[word] = counts.get(word, 0) + 1\nreturn counts",
        "count_words('a b a') == {'a': 2, 'b': 1}",
        "count_words('') == {}",
    ),
    _task(
        "clamp(value, low, high)",
        "Return value, but at least low and at most high.",
        "return max(low, min(value, high))",
        "clamp(5, 0, 3) == 3",
        "clamp(-1, 0, 3) == 0",
        "clamp(2, 0, 3) == 2",
    ),
    _task(
        "second_largest(numbers)",
        "Return the second largest of the different numbers in a list.",
        "return sorted(set(numbers))[-2]",
        "second_largest([4, 1, 4, 3]) == 3",
        "second_largest([1, 2]) == 1",
    ),
    _task(
        "run_lengths(text)",
        "Return a list of pairs (character, number of times it stands in a row); 'aab' gives [('a', 2), ('b', 1)].",
        "found = []\n"
        "for c in text:\n"
        "    if found and found[-1][0] == c:\n"
        "        found[-1] = (c, found[-1][1] + 1)\n"
        "    else:\n"
        "        found.append((c, 1))\n"
        "return found",
        "run_lengths('aab') == [('a', 2), ('b', 1)]",
        "run_lengths('') == []",
    ),
    _task(
        "binary_search(numbers, target)",
        "Return the index of target in a sorted list, or -1 if it is not there.",
        "return numbers.index(target) if target in numbers else -1",
        "binary_search([1, 3, 5, 7], 5) == 2",
        "binary_search([1, 3], 2) == -1",
        "binary_search([], 1) == -1",
    ),
)
LOGIT_PROMPTS = (*CHAT[:2], CHAT[3], *CODE[1:3], CODE[4], CODE[7])
PASSAGE = "\n\n".join(task.prompt + task.solution for task in TASKS)
"""A text of code; perplexity and KL are measured on it, and the long prompt of the logits is its beginning."""
DIFF_PROMPTS = (CODE[4], PASSAGE[:240], f"{CHAT[4]} {CHAT[5]}")
