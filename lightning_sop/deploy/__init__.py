"""Deploy files: small plain checkpoints with a receipt. Needs torch, safetensors and fsspec only."""

from lightning_sop.deploy.content import DeployContent as DeployContent
from lightning_sop.deploy.errors import CollapseError as CollapseError
from lightning_sop.deploy.errors import DeployFileError as DeployFileError
from lightning_sop.deploy.names import deploy_path as deploy_path
from lightning_sop.deploy.store import collapse_file as collapse_file
from lightning_sop.deploy.store import load_into as load_into
from lightning_sop.deploy.store import read as read
from lightning_sop.deploy.store import verify as verify
from lightning_sop.deploy.store import write as write

__all__ = [
    "CollapseError",
    "DeployContent",
    "DeployFileError",
    "collapse_file",
    "deploy_path",
    "load_into",
    "read",
    "verify",
    "write",
]
