"""Accuracy, perplexity and speed of a model, and the accuracy that an engine loses.

from debug import evaluate_model

result = evaluate_model(["engines/qwen-int4"], model="qwen", against="reference")
result.sides[0].tasks["summary"].loss, result.sides[0].agreement.kl_mean, result.to_json()

run.py         opens executors and measures them       options.py, cli.py   the options; the verb `eval`
questions.py   examples of tasks, the toys' or JSONL   answers.py  greedy answers, in batches
passages.py    tokens to be scored, windows of text    scoring.py  perplexity, KL and top-1 on the same tokens
speed.py       tokens per second                       rouge.py    ROUGE, for Chinese as well
statistics.py  intervals of accuracies and losses      results.py, tables.py  the results
harness.py     any engine as a model of lm-evaluation-harness
toys.py        the measured part of the bundled toys' reports
"""
