"""The host's single-process common tests, on three families."""

import inspect
import unittest
from unittest import mock

import pytest

from .harness import HostCase

from transformers_host_tests.generation.test_utils import GenerationTesterMixin  # isort: skip
from transformers_host_tests.test_configuration_common import ConfigTester  # isort: skip
from transformers_host_tests.test_modeling_common import ModelTesterMixin  # isort: skip

pytestmark = pytest.mark.host


class HostCommonCase(HostCase, ModelTesterMixin, GenerationTesterMixin):
    """The host's model and config tests; one subclass per family."""

    def test_config(self) -> None:
        fields = self.model_tester.fields
        ConfigTester(self, config_class=type(self.model_tester.get_config()), **fields).run_common_tests()

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self) -> None:
        # The host skips when it comes to the classifier, last of the classes: it looks for output_attentions in the
        # annotation of **kwargs, which the dense classifier gives as a string. Leaving it out keeps the other classes.
        self.all_model_classes = self.all_model_classes[:2]
        super().test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions()

    def test_moe_models_record_router_logits(self) -> None:
        # The host finds out whether a model has experts by searching its module's source for their decorator. Ours are
        # declared in a module of their own, so without this line the test would take the models for dense ones.
        with mock.patch.object(inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()


class TestLlama(HostCommonCase, unittest.TestCase):
    family = "llama"


class TestQwen3(HostCommonCase, unittest.TestCase):
    family = "qwen3"


class TestGpt2(HostCommonCase, unittest.TestCase):
    family = "gpt2"
