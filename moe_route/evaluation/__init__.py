"""Evaluation of steering by a study: find experts, choose a setting, compare with all controls, report; resumable.

study = read_study("demo")
evaluation = evaluate(study, "results")
print(evaluation.report)
"""

from moe_route.data import shipped_studies
from moe_route.evaluation.pipeline import Evaluation, NullPlanError, evaluate
from moe_route.evaluation.results import mcnemar
from moe_route.evaluation.study import Study, StudyError, parse_assignment, read_study
from moe_route.evaluation.tasks import flexible_extract, normalized_number
from moe_route.runs.job import ForeignFolderError

__all__ = [
    "Evaluation",
    "ForeignFolderError",
    "NullPlanError",
    "Study",
    "StudyError",
    "evaluate",
    "flexible_extract",
    "mcnemar",
    "normalized_number",
    "parse_assignment",
    "read_study",
    "shipped_studies",
]
