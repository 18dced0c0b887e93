"""`nalora evaluate`: base and tuned model on a test set, on general text and on standard tasks, side by side.

May import every other package. What it finds is stored by `runs.evaluations`, which reports and model cards read.
"""
