"""The host's parallel and training tests, on one family; ranks are CPU processes of a gloo group with a time limit."""

import unittest
from typing import Any
from unittest import mock

import pytest

from st_moe import STMoEConfig

from .harness import HostCase

from transformers_host_tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin  # isort: skip
from transformers_host_tests.test_training_mixin import TrainingTesterMixin  # isort: skip

pytestmark = [pytest.mark.host, pytest.mark.distributed]

# The host runs these tests for a list of model types only; None means all.
RESTRICTIONS = (
    (test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES"),
    (test_expert_parallel_mixin, "EP_DISTRIBUTED_TEST_MODEL_TYPES"),
    (test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES"),
)


class DistributedCase(HostCase):
    """A family whose tests run whatever its model type, on machines with fewer cores than ranks, too."""

    family = "llama"

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for module, name in RESTRICTIONS:
            restriction = mock.patch.object(module, name, None)
            restriction.start()
            cls.addClassCleanup(restriction.stop)

    def _skip_if_insufficient_devices(self, world_size: int) -> None:
        """Never: tiny models share the cores."""


class TestTensorAndExpertParallel(
    DistributedCase,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    unittest.TestCase,
):
    pass


class TestFSDP(DistributedCase, test_fsdp_mixin.FSDPTesterMixin, unittest.TestCase):
    # Here each rank sees its own share of a batch, and the mean of the ranks has to equal one process on all of it.
    # The language-model loss and the z-loss are means over tokens and do. The balance loss is not: it multiplies two
    # means over the batch (the load and the probability of an expert), so its value depends on how a batch is split.
    SPLIT_BATCHES = ("test_fsdp2_expert_parallel_2d_vs_ddp", "test_hsdp_grad_accumulation_vs_single_device")

    def _get_tiny_config(self) -> tuple[type[STMoEConfig], dict[str, Any]]:
        config_class, fields = super()._get_tiny_config()
        if self._testMethodName.startswith(self.SPLIT_BATCHES):
            fields = {**fields, "balance_loss_coef": 0.0}
        return config_class, fields


class TestTraining(DistributedCase, TrainingTesterMixin, unittest.TestCase):
    pass
