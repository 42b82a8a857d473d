"""The stages, in the order in which they run. Each has a module with ``run(work)``."""

STAGES = ("shard", "search", "pretrain", "finetune", "aggregate")
TRAINING_STAGES = ("search", "pretrain")  # on any number of ranks, and resumable
