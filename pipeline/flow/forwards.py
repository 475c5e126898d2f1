"""Shows batches to the sites of a model: by a tap the first times, by a script once a signature has come again.

Layer 1. Whatever a script cannot follow, the tap does, in the same forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.plan import Discovery
from pipeline.flow.recording import Recording
from pipeline.flow.replay import Replay
from pipeline.flow.script import Script
from pipeline.flow.signature import Signature, signature_of
from pipeline.flow.tap import Observe, Tap, forward_under, quiet, tapped_forward
from pipeline.flow.trace import copied, mark_state

# batches of more lengths than this come in no order that would pay
MOST = 16
# a model whose forwards depart from their scripts as often chooses its operations by its data
DEPARTURES = 3


class Forwards:
    """The forwards of a model, batch after batch; presents the same as `tapped_forward` and raises the same."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery = discovery
        self._scripts: OrderedDict[Hashable, Script | None] = OrderedDict()
        self._departures = 0
        # along which the last batch was shown, if it was by one
        self.followed: Script | None = None

    def run(self, model: nn.Module, batch: Batch, observe: Observe) -> Any:
        """Run the model on a batch, call `observe` once per site call, return what the model returns."""
        self.followed = None
        batch = copied(batch) if self.discovery.writes_inputs else batch
        signature = signature_of(batch) if self.may_script else None
        if signature is None:
            return tapped_forward(model, self.discovery, batch, observe)
        if signature.key not in self._scripts:
            # one that never comes again is not worth a script
            self._keep(signature.key, None)
            return tapped_forward(model, self.discovery, batch, observe)
        script = self._scripts[signature.key]
        self._scripts.move_to_end(signature.key)
        if script is None or not script.is_alive:
            return self._record(model, batch, signature, observe)
        return self._replay(script, model, batch, signature, observe)

    @property
    def scripts(self) -> int:
        """For how many signatures there is a script."""
        return sum(script is not None for script in self._scripts.values())

    @property
    def may_script(self) -> bool:
        """Whether any forward is still tried by a script."""
        return self._departures < DEPARTURES

    def _keep(self, key: Hashable, script: Script | None) -> None:
        self._scripts[key] = script
        if len(self._scripts) > MOST:
            self._scripts.popitem(last=False)

    def _record(self, model: nn.Module, batch: Batch, signature: Signature, observe: Observe) -> Any:
        tap = Recording(model, self.discovery, batch, observe, signature.leaves)
        out = forward_under(tap, model, batch)
        script = tap.script(model)
        if script is None:
            self._departures = DEPARTURES
            self._scripts.clear()
        else:
            self._keep(signature.key, script)
        return out

    def _replay(self, script: Script, model: nn.Module, batch: Batch, signature: Signature, observe: Observe) -> Any:
        tapped = partial(Tap, model, self.discovery, batch)
        replay = Replay(script, batch, signature.leaves, observe, tapped)
        for leaf in signature.leaves:
            mark_state(leaf)
        try:
            with quiet(model), replay:
                out = batch.forward(model)
        except Exception as error:
            if (blamed := replay.blame(error)) is error:
                raise
            raise blamed from error
        with torch.inference_mode():
            replay.finish()
        if replay.has_departed:
            self._departures += 1
            self._scripts.pop(signature.key)
        else:
            self.followed = script
        return out
