"""Hands notebooks to JupyterLab with the description of the kernel that will run them.

On opening a notebook JupyterLab writes the name and version of its kernel into it, takes that for
an edit, and asks on closing whether to save. The notebooks of the course name no version.
"""

from typing import Any

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import NoSuchKernel, get_kernel_spec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

KERNEL = "python3"


class Contents(AsyncLargeFileManager):
    """Jupyter's own manager of files, which describes the kernel in notebooks that it opens."""

    async def get(self, path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As Jupyter's; the file itself stays as it is until it is saved."""
        model: dict[str, Any] = await super().get(path, *arguments, **options)
        if model["type"] == "notebook" and model["content"] is not None:
            describe(model["content"]["metadata"])
        return model


def describe(metadata: dict[str, Any]) -> None:
    """Write into a notebook's metadata what JupyterLab would, if it is for the kernel python3."""
    if metadata.get("kernelspec", {}).get("name") != KERNEL:
        return
    try:
        spec = get_kernel_spec(KERNEL)
    except NoSuchKernel:
        return  # JupyterLab will say so
    metadata["kernelspec"] = {
        "name": KERNEL,
        "display_name": spec.display_name,
        "language": spec.language,
    }
    metadata["language_info"] = IPythonKernel.language_info
