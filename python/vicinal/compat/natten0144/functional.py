"""`natten.functional` up to 0.14.4."""

from vicinal.compat._legacy_names import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

__all__ = ["natten1dav", "natten1dqkrpb", "natten2dav", "natten2dqkrpb"]
