"""The errors of the library: each says what was attempted, which two facts disagree, and the usual remedy."""


class ModulaError(Exception):
    """Base of every error that this library raises on purpose."""


class SpaceMismatch(ModulaError, TypeError):
    """A codomain meets a domain, or a tensor meets a space, that it does not fit."""


class InvalidArgument(ModulaError, ValueError):
    """An argument lies outside its range, or arguments contradict each other."""


class UnknownBound(ModulaError, TypeError):
    """A module, a loss or a composition does not declare the bound that was asked of it."""


class NonFiniteGradient(ModulaError, ValueError):
    """A gradient holds NaN or infinity; no weight was touched."""
