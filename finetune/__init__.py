"""Fine-tuning room: the Trainer that reports routers, adaptive experts, data, and the report."""

from st_moe.finetune.adaptive import AdaptiveExperts
from st_moe.finetune.trainer import ROUTER_LOG, RouterMetrics, STMoETrainer, STMoETrainerMixin

__all__ = ["ROUTER_LOG", "AdaptiveExperts", "RouterMetrics", "STMoETrainer", "STMoETrainerMixin"]
