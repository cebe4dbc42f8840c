"""What runs a patch: one engine a module, found by its name in the spec."""

from __future__ import annotations

from importlib import import_module

from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.sections import Sections, of_one_section
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec


def load_engine(spec: VolumeSpec) -> Engine:
    """The engine that the spec names, with its model loaded.

    Raises:
        SpecError: The model can't be used as the spec says.
        MissingInputError: A model file isn't there.
    """
    module = import_module(f"{__name__}.{spec.model.engine}")
    is_flat = spec.model.dimensions == 2
    engine = module.load(of_one_section(spec) if is_flat else spec)
    if not isinstance(engine, Engine):
        raise SpecError(f"model.engine: {spec.model.engine} is not an engine")
    return Sections(engine) if is_flat else engine
