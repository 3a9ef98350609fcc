"""What PEFT does not have for a remote model: deep prompts, a record of how a run was made, and
the way back from gradients that were found wrong.

LoRA, IA3 and prompt tuning need nothing from here: use PEFT on ``swarm.model`` as on any model.
"""

from swarm_notebook.tuning.deep_prompts import DeepPrompts
from swarm_notebook.tuning.manifest import MANIFEST_FILE, save_adapter
from swarm_notebook.tuning.rollback import Rollback

__all__ = ["MANIFEST_FILE", "DeepPrompts", "Rollback", "save_adapter"]
