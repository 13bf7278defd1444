"""The interfaces of released natten versions on vicinal's neighborhood attention.

Each package here (natten0144, natten015, natten017, natten020) has the names and the argument order of one
range of versions, so that a file written for it needs one changed import, or none after
`install_as_natten`.
"""

from vicinal.compat.install import install_as_natten

__all__ = ["install_as_natten"]
