"""Names that several commands let a user choose among, as types of their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dpp_lightning.methods.registry import METHODS
from dpp_lightning.tensors.dtypes import DTYPES

if TYPE_CHECKING:  # a type checker wants the choices written out; they are those of two tables, and of plug-ins
    MethodName = str
    DtypeName = str
else:
    MethodName = Literal[tuple(METHODS)]
    DtypeName = Literal[DTYPES]
