"""torch.compile of a swapped PEFT model: one graph, also when adapters are exchanged."""

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_cases import lora
from peft_checks import swap_quietly
from peft_models import input_of, output_of

from deltadiff import DeltaLoRA

X = input_of("mlp", torch.float32)


class Compiled:
    """A model compiled whole, and how many graphs that took."""

    def __init__(self, model):
        torch._dynamo.reset()
        self.model, self.graphs = model, 0
        self.call = torch.compile(model, backend=self._count, fullgraph=True)

    def _count(self, graph, inputs):
        self.graphs += 1
        return graph

    def check(self, x=X):
        """Outputs and gradients of the compiled model are those of the eager one."""
        found = []
        for model in (self.call, self.model):
            self.model.zero_grad()
            y = output_of(model, x)
            y.square().sum().backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            found.append(torch.cat([y.detach().flatten(), *(g.flatten() for g in grads)]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def swapped(prepare=False, **options):
    model = lora(**options).build(torch.float32)
    if prepare:
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    swap_quietly(model)
    return model


@pytest.mark.parametrize("model", ["mlp", "conv1d stack"])
def test_one_graph_for_all_batch_sizes(model):
    compiled = Compiled(swapped(model=model))
    for size in (3, 5, 7):
        compiled.check(torch.randn(size, 8))
    assert compiled.graphs <= 2  # the second has a symbol for the size


def test_a_compiled_call_is_the_fused_operation():
    model, seen = swapped(), []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=look, fullgraph=True)(X)
    assert sum("lora_linear" in name for name in seen) == 2
    assert not any("linear" in name and "lora" not in name for name in seen)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_hot_swapping_does_not_compile_again(options, tmp_path):
    lora(r=3, lora_alpha=1, **options).build(torch.float32).save_pretrained(tmp_path)
    compiled, plain = Compiled(swapped(prepare=True, **options)), lora(**options).build()
    compiled.check()
    for model in (compiled.call, plain):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    compiled.check()
    assert compiled.graphs == 1
    plain = plain.float()
    with torch.no_grad():
        torch.testing.assert_close(compiled.call(X), plain(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("w_update", ["factored", "inplace"])
def test_training_with_delta_lora_does_not_compile_again(w_update):
    model = swapped()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=1, w_update=w_update)
    output_of(model, X).square().sum().backward()
    optimizer.step()  # the layers get their updates in the first step
    compiled = Compiled(model)
    for _ in range(4):
        compiled.check()
        optimizer.step()
    compiled.check()
    assert compiled.graphs == 1


def test_a_layer_that_runs_pefts_forward_compiles_too():
    compiled = Compiled(swapped(lora_bias=True))
    compiled.check()
    assert compiled.graphs == 1
