"""The four stages: shard, pretrain, finetune, aggregate. Each module has ``run(work)``."""
