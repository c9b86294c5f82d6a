"""A round of NVIDIA FLARE's as its controller hands it to an aggregator, without a simulator."""

import warnings

import torch

with warnings.catch_warnings():  # what FLARE warns of while it is imported is FLARE's to mend
    warnings.simplefilter("ignore")
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContextManager
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_common.app_constant import AppConstants


def adapters(count=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = {"A": torch.randn(4, 10, generator=generator), "B": torch.randn(12, 4, generator=generator)}
    return [
        {
            f"base_model.model.q.lora_{side}.weight": (t + 0.3 * torch.randn(t.shape, generator=generator)).to(dtype)
            for side, t in common.items()
        }
        for _ in range(count)
    ]


def models(states, weights=None, **options):
    """One FLModel per client, as the controller hands them over."""
    weights = [1.0] * len(states) if weights is None else weights
    return [
        FLModel(
            params=state,
            metrics={"accuracy": 0.1 * i},
            current_round=0,
            meta={"client_name": f"site-{i}", "NUM_STEPS_CURRENT_ROUND": weight} | options.pop("meta", {}),
            **options,
        )
        for i, (state, weight) in enumerate(zip(states, weights, strict=True))
    ]


def aggregated(aggregator, sent, *, start=None, folder=None):
    """What the aggregator makes of one round."""
    context = FLContextManager().new_context()
    if start is not None:
        learnable = make_model_learnable(weights=start, meta_props={})
        context.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=True)
    if folder is not None:
        context.set_prop(FLContextKey.APP_ROOT, str(folder), private=True, sticky=True)
    aggregator.fl_ctx = context
    aggregator.reset_stats()
    for model in sent:
        aggregator.accept_model(model)
    return aggregator.aggregate_model()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
