"""Texts: read them from any source (``reader``, with a table of published layouts), and the shipped demonstration data.

A small Mixture-of-Experts model, a parallel corpus, a task, and the recorded routing of a large model come with
moe-route.

The model was trained by ``examples/demo_model/train.py``; ``model/MODEL_CARD.md`` in this folder describes its training
and quality. The corpus and the task (ten languages, from English to Swahili) were written for this project. Others
published the recorded routing; ``routing/README.md`` says where.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_route.data.corpus import Corpus
from moe_route.data.languages import LANGUAGE_FAMILIES, families_of
from moe_route.data.reader import CorpusError, CorpusStream, CorpusText, read_texts
from moe_route.data.tasks import Question, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Corpus",
    "CorpusError",
    "CorpusStream",
    "CorpusText",
    "LANGUAGE_FAMILIES",
    "Question",
    "Task",
    "demo_controls",
    "demo_corpus",
    "demo_findings",
    "demo_model_folder",
    "demo_numbers",
    "demo_problems",
    "demo_task",
    "families_of",
    "load_demo_model",
    "read_texts",
    "shipped_routing",
    "shipped_schemas",
    "shipped_studies",
]

_HERE = Path(__file__).resolve().parent


def demo_model_folder() -> Path:
    """The folder of the demonstration checkpoint, for ``AutoModelForCausalLM.from_pretrained``.

    Raises ``FileNotFoundError`` if the installation does not contain it.
    """
    folder = _HERE / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no demonstration model in {folder}: reinstall moe-route, or train one with examples/demo_model/train.py"
        )
    return folder


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demonstration model (on the CPU, in evaluation mode) and its tokenizer.

    It is a Qwen3-MoE with 8 sparse layers of 16 experts, 2 experts per token, and hidden size 128. Its tokenizer puts
    ``<s>`` before every text. It is stored in bfloat16 and computes in ``dtype``. ``MODEL_CARD.md`` in its folder
    (``demo_model_folder``) says what it learned. Raises ``ImportError`` if transformers is missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("the demonstration model needs transformers: pip install 'moe-route[hf]'") from error
    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading 11 MB needs no progress bar
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    model.config._name_or_path = "demo"  # the name goes into statistics files, in place of the installation folder
    return model.eval(), tokenizer


def shipped_studies() -> dict[str, Path]:
    """Name -> TOML file of each study that moe-route brings: the demonstration, and the settings of a publication."""
    return {path.stem: path for path in sorted((_HERE / "studies").glob("*.toml"))}


def shipped_schemas() -> dict[str, Path]:
    """Name -> JSON Schema of each kind of file that people write, by which editors complete and check it."""
    return {path.stem: path for path in sorted((_HERE / "schemas").glob("*.json"))}


def shipped_routing() -> dict[str, Path]:
    """Name -> file of each published recording that moe-route brings; `convert.published_routing` reads them.

    ``README.md`` beside them tells where they come from.
    """
    return {path.stem: path for path in sorted((_HERE / "routing").glob("*.npz"))}


def demo_corpus() -> Corpus:
    """Everyday sentences in ten languages: English, then by decreasing amount of text in the model's training data."""
    return Corpus.read("general")


def demo_problems() -> Task:
    """Sums and differences in digits, in the same ten languages, in three subsets of 120 problems.

    Their pairs of numbers were seen in training in every language ("seen"), in English alone ("english_only"), or in
    none ("unseen").
    """
    return Task.read_tsv(_HERE / "corpus" / "problems.tsv")


def demo_controls() -> Task:
    """What else there is to do with digits: 24 numbers to copy ("copy") and 24 counts to go on with ("count").

    No language saw these numbers in these sentences in training. Their answers are as large as those of the problems.
    """
    return Task.read_tsv(_HERE / "corpus" / "controls.tsv")


def demo_numbers() -> Corpus:
    """150 English sentences with a number below 100 in digits: what experts of sums are compared with."""
    return Corpus.read(_HERE / "corpus" / "numbers.tsv")


def demo_findings() -> dict[str, Any]:
    """What `examples/findings` measured on the demonstration model: its command, and each claim with its interval."""
    content: dict[str, Any] = json.loads((_HERE / "findings.json").read_text(encoding="utf-8"))
    return content


def demo_task() -> Corpus:
    """The problems of `demo_problems` that every language saw in training, with their answers, as texts."""
    return Corpus.read("arithmetic")
