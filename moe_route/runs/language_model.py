"""Load a causal language model and run it on texts: logits, token losses, answers, continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moe_route.base import hub
from moe_route.base.ranks import ALONE, ModelParallelGroup
from moe_route.calls.call import fewer_logits
from moe_route.data import Question, demo_model_folder, load_demo_model
from moe_route.data.batches import Batch, EncodedTexts, Text, encode, padded_batches, token_ids
from moe_route.routed import RoutedModel, attach, labeled_texts
from moe_route.training import is_upcycled, load_upcycled, with_sparse_blocks

DEMO_MODEL = "demo"
# tried in this order; the first one that knows a configuration builds its model
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")


class ModelNotFoundError(ValueError):
    """Raised if no model can be loaded under a name; the message gives the reason and what to do."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How a model answers n questions.

    Attributes:
        correct: bool [n], whether greedy search gives the right answer.
        nats: float64 [n], negative log-probability of the right answer in nats.
    """

    correct: np.ndarray
    nats: np.ndarray


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer, ready to run (`eval` mode).

    `add_special_tokens` tells whether the tokenizer adds its special tokens to texts; those of a chat template have
    them already.
    """

    name: str
    model: Any
    tokenizer: Any
    add_special_tokens: bool = True

    @classmethod
    def load(
        cls,
        name: str = DEMO_MODEL,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        dequantize: bool = False,
        device_map: str | None = None,
        group: ModelParallelGroup = ALONE,
    ) -> LanguageModel:
        """Load the model in folder `name`, or on the Hugging Face hub under `name`, or the shipped one ("demo").

        `revision` is a commit, tag or branch on the hub. `dequantize` converts MXFP4 weights (gpt-oss) to `dtype`,
        because in MXFP4 the router is bypassed. `device_map` spreads the layers over devices, as in transformers
        ("auto": all GPUs, then memory, then disk). The ranks of `group` hold one model together. Code that comes with
        a checkpoint is never run. Raises `ModelNotFoundError` if nothing can be loaded, and `ValueError` for a device
        beside a device map or a group.
        """
        if device is not None and device_map is not None:
            raise ValueError("a device map places the layers itself: give either a device or a device map")
        if group.how is not None and (device is not None or device_map is not None):
            raise ValueError("a model that is divided among ranks lies on their devices: leave out device and map")
        place, precision = _device(device), _dtype(dtype)
        if name == DEMO_MODEL and precision == "auto":
            precision = torch.float32  # its weights are stored in less
        if name == DEMO_MODEL and device_map is None and group.how is None:
            loaded: tuple[Any, Any] = load_demo_model(precision)
            model, tokenizer = loaded
        else:
            where = str(demo_model_folder()) if name == DEMO_MODEL else name
            model, tokenizer = _from_pretrained(where, precision, revision, dequantize, device_map, group)
            if name == DEMO_MODEL:
                model.config._name_or_path = name  # as load_demo_model has it
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return cls(name, model.eval() if place is None else model.to(place).eval(), tokenizer)

    def untrained(self, seed: int = 0) -> LanguageModel:
        """A model of the same configuration, dtype and device with random weights, and the same tokenizer.

        Raises `ValueError` if transformers has no causal language model of this configuration.
        """
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = AutoModelForCausalLM.from_config(self.model.config, dtype=self.model.dtype)
            model: Any = with_sparse_blocks(made)
        return replace(self, name=f"{self.name}, untrained", model=model.to(self.model.device).eval())

    def attach(
        self, engine: Literal["hook", "fused"] = "hook", *, ties: Literal["index", "model"] = "index"
    ) -> RoutedModel:
        """Attach to the model, as `moe_route.attach` does.

        Raises its errors, and `ValueError` for a model without weights, which could be attached to but does not run.
        """
        if self.model.device.type == "meta" and not hasattr(self.model, "hf_device_map"):
            raise ValueError("the model is on the device meta, which has no weights: use the device cpu")
        return attach(self.model, engine=engine, ties=ties)

    def encode(self, texts: Sequence[Text] | EncodedTexts, *, max_length: int | None = None) -> EncodedTexts:
        """Convert texts to tokens, and cut those longer than `max_length` tokens (by default the model's maximum).

        Encoded texts are returned unchanged; `max_length` is then refused with `ValueError`.
        """
        if isinstance(texts, EncodedTexts):
            if max_length is not None:
                raise ValueError("these texts are encoded already: pass max_length to encode()")
            return texts
        limit = max_length or self._context
        return encode(self.tokenizer, texts, limit=limit, add_special_tokens=self.add_special_tokens)

    @property
    def _context(self) -> int | None:
        """Number of tokens that the model reads at most, if its configuration says."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit

    def _ids(self, texts: Sequence[Text]) -> list[list[int]]:
        return token_ids(self.tokenizer, texts, add_special_tokens=self.add_special_tokens)

    def batches(
        self,
        texts: Sequence[Text] | EncodedTexts,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: str | None = None,
    ) -> Iterator[Batch]:
        """Yield padded batches of `texts` on the model's device, as `data.batches.padded_batches` orders them.

        `max_length` is as in `encode`. `progress` is the caption of a progress bar on standard error.
        """
        encoded = self.encode(texts, max_length=max_length)
        device = self.model.device
        return padded_batches(self.tokenizer, encoded, batch_size=batch_size, device=device, progress=progress)

    def run(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits over the vocabulary, [B, S, V]; at `positions` alone, int64 [P], it is [B, P, V].

        Every token runs through every layer in either case. Fewer positions save the product with the vocabulary,
        which costs a small model as much as its layers; a model that cannot leave it out computes all of them.
        """
        few = {} if positions is None else fewer_logits(self.model, positions)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**batch.inputs, use_cache=False, **few).logits
            return logits if positions is None or few else logits[:, positions]

    def labeled(self, texts: Sequence[Text] | Sequence[Question]) -> AbstractContextManager[None]:
        """Label the rows of a batch by the group (of questions: the language) and item of each, if nothing does yet.

        Recordings, plans and adapters by group follow these labels, as those of `RoutedModel.labels`.
        """
        groups = [text.group if isinstance(text, Text) else text.language for text in texts]
        return labeled_texts(self.model, groups, [text.item for text in texts])

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        """Continue `prompt` by greedy search, with at most `max_new_tokens` tokens; returns the continuation."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new: str = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return new

    def losses(
        self,
        texts: Sequence[Text] | EncodedTexts,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: str | None = None,
    ) -> np.ndarray:
        """Loss of each text, float64 [len(texts), 2]: the sum in nats over its predicted tokens, and their number.

        Every token but the first is predicted from those before it; padding is never predicted. Texts run under their
        groups and items, which a plan steers by. To learn how many texts were cut, pass the result of `encode`.
        """
        encoded = self.encode(texts, max_length=max_length)
        sums = np.zeros((len(encoded.texts), 2))
        for batch in self.batches(encoded, batch_size=batch_size, progress=progress):
            ids, mask = batch.inputs["input_ids"][:, 1:], batch.inputs["attention_mask"][:, 1:]
            with self.labeled(batch.texts):
                logits = self.run(batch)[:, :-1].float().flatten(0, 1)
            nats = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="none").view(mask.shape) * mask
            sums[list(batch.positions), 0] = nats.double().sum(1).cpu().numpy()
            sums[list(batch.positions), 1] = mask.sum(1).cpu().numpy()
        return sums

    def answers(self, questions: Sequence[Question], *, batch_size: int = 64, progress: str | None = None) -> Answers:
        """Judge the right answer of each question: whether it is the greedy continuation, and its probability.

        The answer is read after its prompt in one call, under the language and item of the question. It is what greedy
        search gives if each of its tokens is the most probable one after those before it. Raises `ValueError` for a
        question that does not fit into the model's context, and for one whose answer adds no token to its prompt.
        """
        prompts = self._ids([Text(q.language, q.item, q.prompt) for q in questions])
        texts = tuple(Text(q.language, q.item, q.prompt + q.answer) for q in questions)
        whole = [tuple(row) for row in self._ids(texts)]
        limit = self._context
        for question, prompt, row in zip(questions, prompts, whole, strict=True):
            if limit is not None and len(row) > limit:
                raise ValueError(
                    f"question {question.item!r} in {question.language} has {len(row)} tokens, and the model reads "
                    f"{limit}: leave it out"
                )
            if not question.answer or list(row) == prompt:
                raise ValueError(f"question {question.item!r} in {question.language} has an empty answer: leave it out")
        starts = [_common_prefix(prompt, row) for prompt, row in zip(prompts, whole, strict=True)]
        correct, nats = np.zeros(len(whole), bool), np.zeros(len(whole))
        encoded = EncodedTexts(texts, tuple(whole), (), None)
        for batch in self.batches(encoded, batch_size=batch_size, progress=progress):
            ids = batch.inputs["input_ids"][:, 1:]
            position = torch.arange(ids.shape[1], device=ids.device) + 1
            start = torch.tensor([starts[i] for i in batch.positions], device=ids.device)
            asked = (position >= start[:, None]) & batch.inputs["attention_mask"][:, 1:].bool()
            # Answers are a few tokens at the end of texts of similar length, so few positions hold one.
            (places,) = asked.any(0).nonzero(as_tuple=True)
            ids, asked = ids[:, places], asked[:, places]
            with self.labeled(batch.texts):
                logits = self.run(batch, places)[asked].float()
            of_token = torch.zeros(ids.shape, device=ids.device)
            of_token[asked] = torch.nn.functional.cross_entropy(logits, ids[asked], reduction="none")
            right = ~asked
            right[asked] = logits.argmax(-1) == ids[asked]
            nats[list(batch.positions)] = of_token.double().sum(1).cpu().numpy()
            correct[list(batch.positions)] = right.all(1).cpu().numpy()
        return Answers(correct, nats)


def _common_prefix(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Number of tokens at the beginning of `whole` that are those of `prompt`; at least 1."""
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return max(1, min(same, len(whole) - 1))


def _device(name: str | torch.device | None) -> torch.device | None:
    """The device with this name, tested by allocating a tensor on it."""
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ValueError(f"there is no device {str(name)!r} here ({str(error).splitlines()[0]}): use cpu") from error


def _dtype(name: str | torch.dtype) -> Any:
    """The dtype with this name; "auto" is kept."""
    dtype = getattr(torch, name, None) if isinstance(name, str) and name != "auto" else name
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{name!r} is not a dtype for weights: use auto, float32, bfloat16 or float16")
    return dtype


def _from_pretrained(
    name: str,
    dtype: Any,
    revision: str | None,
    dequantize: bool,
    device_map: str | None,
    group: ModelParallelGroup,
) -> tuple[Any, Any]:
    try:
        import transformers
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ImportError("a model by name needs transformers: pip install 'moe-route[hf]'") from error
    _refuse_missing_folder(name)
    what = "model"
    local: dict[str, Any] = {"local_files_only": not hub.answers(name), "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(name, **local)
        what = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
        # without tokenizer files, transformers makes an empty tokenizer
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it has no vocabulary")
        what = "model"
        if device_map is not None:
            local["device_map"] = device_map
        if dequantize:
            from transformers.utils.quantization_config import Mxfp4Config

            local["quantization_config"] = Mxfp4Config(dequantize=True)
        # a model of images and texts reads texts alone, too
        maker = _auto_class(config, transformers, _AUTO_CLASSES[:2]) or transformers.AutoModelForCausalLM
        local |= group.load_options()
        load: Any = load_upcycled if is_upcycled(config) else maker.from_pretrained
        return load(name, dtype=dtype, **local), tokenizer
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = (
            "give a folder with a checkpoint, or a name on the hub"
            if what == "model"
            else "save the checkpoint's tokenizer beside its weights (tokenizer.save_pretrained)"
        )
        raise ModelNotFoundError(f"no {what} can be loaded from {name!r} ({reason}): {fix}") from error


def model_without_weights(name: str = DEMO_MODEL, *, revision: str | None = None) -> Any:
    """Build the model in folder `name`, on the hub under `name`, or the shipped one ("demo"), on the meta device.

    Only its configuration is read: neither weights nor a tokenizer are needed, and nothing is computed. Its modules are
    those of an unquantized checkpoint. Raises `ModelNotFoundError` if there is no configuration of a known model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a model by name needs transformers: pip install 'moe-route[hf]'") from error
    _refuse_missing_folder(name)
    place = str(demo_model_folder()) if name == DEMO_MODEL else name
    try:
        config = transformers.AutoConfig.from_pretrained(
            place, local_files_only=not hub.answers(place), revision=revision or "main"
        )
        config._name_or_path = name
        maker = _auto_class(config, transformers, _AUTO_CLASSES)
        if maker is None:
            raise ValueError(f"transformers has no model of the configuration {type(config).__name__}")
        with torch.device("meta"):
            return with_sparse_blocks(maker.from_config(config))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"no configuration can be read from {name!r} ({reason}): give a folder with a config.json of transformers, "
            "or a name on the hub"
        ) from error


def _auto_class(config: Any, transformers: Any, kinds: Sequence[str]) -> Any:
    """The first of these classes that knows the configuration, or None."""
    known = [auto for kind in kinds if (auto := getattr(transformers, kind, None)) is not None]
    return next((auto for auto in known if type(config) in auto._model_mapping), None)


def _refuse_missing_folder(name: str) -> None:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # the hub has no such names
        raise ModelNotFoundError(f"there is no folder {name!r}: give a folder with a checkpoint, or a name on the hub")
