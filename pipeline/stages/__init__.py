"""The four stages: shard, pretrain, finetune, aggregate. Each module has ``FORMAT`` and ``run(work)``."""
