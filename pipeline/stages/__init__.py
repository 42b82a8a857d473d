"""The stages, in the order in which they run. Each has a module with ``run(work)``."""

STAGES = ("shard", "search", "pretrain", "finetune", "aggregate")
TRAINING_STAGES = ("search", "pretrain")  # on any number of ranks, and resumable
GPU_STAGES = (
    *TRAINING_STAGES,
    "finetune",
)  # that compute on a GPU where there is one; the others never ask for one
