"""What PEFT does not have for a remote model: deep prompts, and a record of how a run was made.

LoRA, IA3 and prompt tuning need nothing from here: use PEFT on ``swarm.model`` as on any model.
"""

from swarm_notebook.tuning.deep_prompts import DeepPrompts
from swarm_notebook.tuning.manifest import MANIFEST_FILE, save_adapter

__all__ = ["MANIFEST_FILE", "DeepPrompts", "save_adapter"]
