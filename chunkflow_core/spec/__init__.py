"""The volume spec: one YAML file that says everything about a run.

It is parsed, validated, completed and fingerprinted here. Imported whenever Airflow parses its DAG
files, so it imports neither PyTorch nor CloudVolume.
"""

from chunkflow_core.spec.loading import load_spec, parse_spec
from chunkflow_core.spec.volume import VolumeSpec

__all__ = ["VolumeSpec", "load_spec", "parse_spec"]
