"""The versions that a lesson runs with."""

from importlib.metadata import version

PACKAGES = (
    *("torch", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate"),
    *("openai", "jupyterlab"),
)


def environment() -> str:
    """The versions of Python and of the packages that this notebook runs with."""
    import platform

    packages = [f"{package} {version(package)}" for package in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])
