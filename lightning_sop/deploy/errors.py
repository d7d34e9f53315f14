"""What can go wrong with a deploy file."""


class CollapseError(RuntimeError):
    """The plain weights do not compute what the trained model computes, so the deploy file was refused."""


class DeployFileError(RuntimeError):
    """A file is not a readable deploy file: corrupt, truncated or of another kind."""
