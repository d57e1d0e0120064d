"""What `make bench` measures on the CPU: the sections of `moe-route bench`, and those that only the project runs.

python -m bench.cpu                                      # everything, a quarter of an hour and more, one thread
python -m bench.cpu --quick                              # every section in two minutes: small cases, few rounds
python -m bench.cpu --sections experts --threads 2       # some sections
"""

from moe_route.bench.sections import SECTIONS as _OF_THE_PACKAGE
from moe_route.bench.sections import Section

SECTIONS = {
    **_OF_THE_PACKAGE,
    "dispatch": Section(
        "dispatch, permute and combine against argsort, index_select and index_add", "bench.cpu.dispatch:measure"
    ),
    "recording": Section(
        "recording a model that decodes, against statistics by hand", "bench.cpu.recording:measure", transformers=True
    ),
    "recording-options": Section(
        "what each option of record adds to a prefill and a decode step",
        "bench.cpu.recording:measure_options",
        transformers=True,
    ),
    "experts": Section(
        "the experts of one layer against those of transformers",
        "bench.cpu.experts:measure",
        file="experts",
        transformers=True,
    ),
    "models": Section(
        "a whole model with moe-route, and with what a user would take instead",
        "bench.cpu.models:measure",
        file="models",
        transformers=True,
    ),
    "growth": Section(
        "memory, disk and time of recordings as they grow",
        "bench.cpu.growth:measure",
        file="growth",
        transformers=True,
    ),
}
