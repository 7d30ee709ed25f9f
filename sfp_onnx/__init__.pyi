"""The public names with their types; `__init__.py` imports them when they are asked for."""

__version__: str

from .core.errors import (
    DataError as DataError,
    ModelError as ModelError,
    OptionError as OptionError,
    OutputError as OutputError,
    PlanError as PlanError,
    SfpError as SfpError,
    TargetError as TargetError,
    VerificationError as VerificationError,
)
from .core.options import (
    DataOptions as DataOptions,
    InspectOptions as InspectOptions,
    MeasureOptions as MeasureOptions,
    OutputOptions as OutputOptions,
    PlanOptions as PlanOptions,
    RepairOptions as RepairOptions,
    ScoreOptions as ScoreOptions,
)
from .core.types import Cut as Cut, Group as Group, Plan as Plan, Size as Size
from .coupling.analysis import Analysis as Analysis, data_for as data_for, inspect as inspect, load as load
from .cut.verify import Verification as Verification
from .data import Preprocessing as Preprocessing
from .data.dataset import Dataset as Dataset, open_data as open_data
from .evaluation import Evaluation as Evaluation
from .graph import Model as Model
from .graph.save import save as save
from .methods.dilution.stages import Diluted as Diluted, DiluteOptions as DiluteOptions, dilute as dilute
from .methods.sfp.probe import ProfileOptions as ProfileOptions
from .methods.sfp.profiles import LayerProfile as LayerProfile, Profiles as Profiles, class_profiles as class_profiles
from .pipeline.applied import apply as apply
from .pipeline.measured import device_profile as device_profile, evaluate as evaluate
from .pipeline.planned import plan as plan
from .pipeline.pruned import prune as prune
from .pipeline.scored import calibrate as calibrate, score as score
from .pipeline.swept import Sweep as Sweep, sweep as sweep
from .report.manifest import Pruned as Pruned, manifest as manifest, read_plan as read_plan
from .report.points import Point as Point
from .scores.scoring import Scored as Scored, save_scores as save_scores, scored as scored
