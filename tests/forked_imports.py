"""What most programs of tests import; the server of their forks imports it once, as a training does."""

import gc

gc.disable()

from esvit_core.torch_private import import_timm_without_dynamo  # noqa: E402

import_timm_without_dynamo()

import esvit_core.launch.agent  # noqa: E402
import esvit_core.training.main  # noqa: E402, F401

gc.freeze()
gc.enable()
