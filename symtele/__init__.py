"Symmetry teleportation: move parameters along a level set of the loss, exactly"

__version__ = "0.1.0"

# closed forms and rules register themselves
from . import closed as closed
from . import rules as rules
from .balance import Balance
from .batch import BatchGL, LeastSquares
from .groups import (
    Orthogonal,
    Rotation,
    booth,
    check_symmetry,
    ellipse,
    rosenbrock,
)
from .level_sets import LevelSet, NullSpace
from .networks import GL, Permutation, Scaling, Wiring
from .objectives import grad_norm, landscape, lookahead, loss_of
from .searches import Ascent, GreatCircle, Grid, Random, Sample, Stay
from .teleporting import Teleported, teleport
from .training import (
    Teleporter,
    at,
    every,
    first,
    keep,
    reset,
    transport,
    when,
)
from .whitening import Whiten
from .wiring import wire

__all__ = [
    "GL",
    "Ascent",
    "Balance",
    "BatchGL",
    "GreatCircle",
    "Grid",
    "LeastSquares",
    "LevelSet",
    "NullSpace",
    "Orthogonal",
    "Permutation",
    "Random",
    "Rotation",
    "Sample",
    "Scaling",
    "Stay",
    "Teleported",
    "Teleporter",
    "Whiten",
    "Wiring",
    "at",
    "booth",
    "check_symmetry",
    "ellipse",
    "every",
    "first",
    "grad_norm",
    "keep",
    "landscape",
    "lookahead",
    "loss_of",
    "reset",
    "rosenbrock",
    "teleport",
    "transport",
    "when",
    "wire",
]
