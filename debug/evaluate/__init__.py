"""What a model can do, and what an engine of it loses.

from debug import evaluate_model

result = evaluate_model(["engines/qwen-int4"], model="qwen", against="reference")
result.sides[0].tasks["summary"].loss, result.sides[0].agreement.kl_mean, result.to_json()

run.py         opens the sides and measures them       options.py, cli.py   what is measured; the verb `eval`
questions.py   examples of tasks, the toys' or JSONL   answers.py  greedy answers, in batches
passages.py    tokens to be scored, windows of text    scoring.py  perplexity, KL and top-1 on the same tokens
speed.py       tokens per second                       rouge.py    ROUGE, for Chinese as well
statistics.py  intervals of accuracies and losses      results.py, tables.py  what comes out
harness.py     any engine as a model of lm-evaluation-harness
toys.py        the measured part of the bundled toys' reports
"""
