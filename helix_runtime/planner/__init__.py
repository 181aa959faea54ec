"""Which layout to serve: every legal one with what it holds, how fast it should be, and what bounds it.

`plan` answers one question; `cost` is the roofline below it, vectorised over layouts and batches; `calibration` fits
its efficiencies to measurements. Legal layouts come from `helix_runtime.layout`. No torch and no vLLM here.
"""

from helix_runtime.planner.calibration import Calibration, calibrate
from helix_runtime.planner.hardware import Gpu, PlannerError, known_gpus, load_gpu
from helix_runtime.planner.plan import Plan, Question, plan

__all__ = ["Calibration", "Gpu", "Plan", "PlannerError", "Question", "calibrate", "known_gpus", "load_gpu", "plan"]
