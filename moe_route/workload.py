"""A causal language model at work on texts: loading it, padding batches, recording what its routers do, token
losses."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from tqdm import tqdm

from moe_route import _C
from moe_route.data import Corpus, demo_corpus, demo_task, load_demo_model
from moe_route.routed import RoutedModel, attach

if TYPE_CHECKING:
    from moe_route.recording import Recorder

__all__ = [
    "DEMO_MODEL",
    "Batch",
    "EncodedTexts",
    "LanguageModel",
    "ModelNotFoundError",
    "Text",
    "read_corpus",
    "record_texts",
    "texts_of",
]

DEMO_MODEL = "demo"
_HTTPS = 443
_CONNECT_SECONDS = 5.0
SHIPPED = {"general": demo_corpus, "arithmetic": demo_task}


class ModelNotFoundError(ValueError):
    """No model could be loaded under that name; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence to run: its group (a language, a task) and its item, which pairs it with its translations."""

    group: str
    item: str
    text: str


def read_corpus(
    path: str | Path | None = None, *, languages: Sequence[str] | None = None, limit: int | None = None
) -> Corpus:
    """The corpus at `path`: a table of tab-separated texts, a folder laid out like FLORES, or the name of one that
    moe-route brings ("general", which is the default, or "arithmetic").

    `languages` takes these only, `limit` the first so many items. Raises as `Corpus.read` does.
    """
    shipped = SHIPPED.get(str(path or "general"))
    corpus = shipped() if shipped is not None else Corpus.read(path or "", languages)
    return corpus.subset(languages, limit)


def texts_of(corpus: Corpus) -> list[Text]:
    """Every text of a corpus, language by language; the language is its group."""
    return [
        Text(language, item, text)
        for language in corpus.languages
        for item, text in zip(corpus.items, corpus[language], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Texts as tokens, and how many of them were too long.

    Attributes:
        texts: the texts, n of them.
        ids: token ids of each.
        shortened: which of them had more than ``limit`` tokens and lost the rest, positions in rising order.
        limit: tokens a text may have, None for any number.
    """

    texts: tuple[Text, ...]
    ids: tuple[tuple[int, ...], ...]
    shortened: tuple[int, ...]
    limit: int | None

    @property
    def cut(self) -> int:
        """How many texts were cut."""
        return len(self.shortened)

    def only(self, positions: Sequence[int]) -> EncodedTexts:
        """The texts at these positions."""
        place = {position: new for new, position in enumerate(positions)}
        shortened = tuple(place[i] for i in self.shortened if i in place)
        return EncodedTexts(
            tuple(self.texts[i] for i in positions), tuple(self.ids[i] for i in positions), shortened, self.limit
        )

    @property
    def note(self) -> str:
        """What was cut, in a few words; "" where nothing was."""
        return f"{self.cut} of {len(self.texts)} texts cut to {self.limit} tokens" if self.cut else ""

    @property
    def metadata(self) -> dict[str, Any]:
        """The same as metadata of a recording, which merges with that of others; empty where nothing was cut."""
        return {"cut_texts": self.cut, "cut_to_tokens": [self.limit]} if self.cut else {}


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded texts: `inputs` are `input_ids` and `attention_mask`, int64 [B, S], padded on the right."""

    texts: tuple[Text, ...]
    positions: tuple[int, ...]  # where each text stands among the texts that were batched
    inputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer, ready to run (`eval` mode)."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(
        cls, name: str = DEMO_MODEL, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
    ) -> LanguageModel:
        """The model in folder `name`, on the Hugging Face hub under `name`, or the one moe-route brings ("demo").

        Code that comes with a checkpoint is never run. Raises `ModelNotFoundError` where nothing can be loaded.
        """
        place, precision = _device(device), _dtype(dtype)
        if name == DEMO_MODEL:
            loaded: tuple[Any, Any] = load_demo_model(torch.float32 if precision == "auto" else precision)
            model, tokenizer = loaded
        else:
            model, tokenizer = _from_pretrained(name, precision)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return cls(name, model.eval() if place is None else model.to(place).eval(), tokenizer)

    def attach(self, engine: Literal["hook", "fused"] = "hook") -> RoutedModel:
        """Attach to the model. Raises `ValueError` where this build has no kernels for its device, and what
        `moe_route.attach` raises."""
        device = self.model.device
        if device.type != "cpu" and not (device.type == "cuda" and _C.build_info()["cuda"]):
            raise ValueError(
                f"the model is on {device}, and this build has kernels for the CPU only: use the device cpu"
            )
        return attach(self.model, engine=engine)

    def encode(self, texts: Sequence[Text] | EncodedTexts, *, max_length: int | None = None) -> EncodedTexts:
        """`texts` as tokens. Those longer than `max_length` tokens (default: what the model was made for) are cut and
        counted. Texts that are encoded already stay as they are; `max_length` is then refused with `ValueError`."""
        if isinstance(texts, EncodedTexts):
            if max_length is not None:
                raise ValueError("these texts are encoded already: pass max_length to encode()")
            return texts
        limit = max_length or getattr(self.model.config, "max_position_embeddings", None)
        ids = [tuple(row) for row in self._ids(texts)]
        long = [] if limit is None else [i for i, row in enumerate(ids) if len(row) > limit]
        # the tokenizer cuts, since it knows which tokens belong at the end
        for i, row in zip(long, self._ids([texts[i] for i in long], truncation=True, max_length=limit), strict=True):
            ids[i] = tuple(row)
        return EncodedTexts(tuple(texts), tuple(ids), tuple(long), limit)

    def _ids(self, texts: Sequence[Text], **options: Any) -> list[list[int]]:
        # not verbose: it warns of texts that are too long, which are cut here
        found = self.tokenizer([text.text for text in texts], verbose=False, **options) if texts else {"input_ids": []}
        ids: list[list[int]] = found["input_ids"]
        return ids

    def batches(
        self,
        texts: Sequence[Text] | EncodedTexts,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: str | None = None,
    ) -> Iterator[Batch]:
        """`texts` in padded batches, texts of like length together so that little is padding.

        The longest texts come first, since they show whether the memory suffices; the other batches come in a fixed
        random order, so that work that is ended early has seen texts of every length.

        `max_length` is that of `encode`. `progress` is the caption of a progress bar on standard error.
        """
        encoded = self.encode(texts, max_length=max_length)
        order = sorted(range(len(encoded.ids)), key=lambda i: -len(encoded.ids[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        chunks[1:] = random.Random(0).sample(chunks[1:], len(chunks[1:]))
        for chunk in tqdm(chunks, desc=progress, disable=progress is None, leave=False):
            inputs = self.tokenizer.pad({"input_ids": [list(encoded.ids[i]) for i in chunk]}, return_tensors="pt")
            on_device = {k: inputs[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
            yield Batch(tuple(encoded.texts[i] for i in chunk), tuple(chunk), on_device)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits over the vocabulary, [B, S, V]."""
        with torch.inference_mode():
            return self.model(**batch.inputs, use_cache=False).logits

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        """What the model adds to `prompt` by greedy search, at most `max_new_tokens` tokens."""
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
        """float64 [len(texts), 2]: for each text the summed loss in nats of its predicted tokens, and their number.

        Every token but the first is predicted from those before it; padding is never predicted. To know how many texts
        were cut, pass what `encode` gives.
        """
        encoded = self.encode(texts, max_length=max_length)
        found = np.zeros((len(encoded.texts), 2))
        for batch in self.batches(encoded, batch_size=batch_size, progress=progress):
            ids, mask = batch.inputs["input_ids"][:, 1:], batch.inputs["attention_mask"][:, 1:]
            logits = self.run(batch)[:, :-1].float().flatten(0, 1)
            nats = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="none").view(mask.shape) * mask
            found[list(batch.positions), 0] = nats.double().sum(1).cpu().numpy()
            found[list(batch.positions), 1] = mask.sum(1).cpu().numpy()
        return found


def record_texts(
    recorder: Recorder,
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> EncodedTexts:
    """Run every text under its labels: its group, and its item as the key that pairs translations.

    `stop` is asked before each batch; where it answers True, the texts that are left do not run. Returns the texts that
    ran. How many of them were cut goes into the metadata of the recording: `cut_texts`, their number, and
    `cut_to_tokens`, the limits they were cut to.
    """
    encoded = language_model.encode(texts, max_length=max_length)
    done: list[int] = []
    for batch in language_model.batches(encoded, batch_size=batch_size, progress=progress):
        if stop():
            break
        groups, items = [text.group for text in batch.texts], [text.item for text in batch.texts]
        with recorder.labels(groups=groups, items=items):
            language_model.run(batch)
        done.extend(batch.positions)
    ran = encoded.only(sorted(done))
    recorder.add_metadata(ran.metadata)
    return ran


def _device(name: str | torch.device | None) -> torch.device | None:
    """The device of that name, checked by putting something there."""
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"there is no device {str(name)!r} here ({str(error).splitlines()[0]}): use cpu") from error


def _dtype(name: str | torch.dtype) -> Any:
    """The dtype of that name; "auto" stays."""
    found = getattr(torch, name, None) if isinstance(name, str) and name != "auto" else name
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{name!r} is no dtype for weights: use auto, float32, bfloat16 or float16")
    return found


def _from_pretrained(name: str, dtype: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("a model by name needs transformers: pip install 'moe-route[hf]'") from error
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # the hub has no such names
        raise ModelNotFoundError(f"there is no folder {name!r}: give a folder with a checkpoint, or a name on the hub")
    what = "model"
    local = {"local_files_only": not _hub_answers(name)}
    try:
        AutoConfig.from_pretrained(name, **local)
        what = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
        # transformers makes up an empty one where there are no files of it
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it has no vocabulary")
        what = "model"
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **local), tokenizer
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = (
            "give a folder with a checkpoint, or a name on the hub"
            if what == "model"
            else "save the checkpoint's tokenizer beside its weights (tokenizer.save_pretrained)"
        )
        raise ModelNotFoundError(f"no {what} can be loaded from {name!r} ({reason}): {mend}") from error


def _hub_answers(name: str) -> bool:
    """Whether it is worth asking the hub for the files of ``name``: without a network it is asked for half a minute."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if Path(name).exists() or getproxies() or hub.hostname is None:  # a proxy may reach what cannot be seen from here
        return True
    try:
        socket.create_connection((hub.hostname, hub.port or _HTTPS), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
