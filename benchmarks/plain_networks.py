"""The networks as the published code computes them, for comparison: nothing here is optimized on purpose.

:func:`plainly` converts one of our networks to this form in place. Weights and names stay; only the forward pass
changes: feature maps are padded, rolled and partitioned by copies, masks are built again in every block, attention is a
product, a sum, a softmax and a product, ViL stores channels before positions, CvT channels before the feature map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit_core.models import cvt, heads, swin
from esvit_core.models.layers import longformer
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import MASKED


def plainly(network: nn.Module) -> nn.Module:
    """Make ``network`` compute as the published code does."""
    for module in network.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    return network


class PlainPrototypes(heads.Prototypes):
    def forward(self, x: Tensor) -> Tensor:  # always the logits themselves, whatever their number
        return F.linear(x, self.weight())


class PlainStochasticDepth(StochasticDepth):
    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        y = branch(x)
        if self.drop_prob == 0 or not self.training:
            return x + y
        keep = 1 - self.drop_prob
        mask = y.new_empty(len(y), *(1,) * (y.ndim - 1)).bernoulli_(keep)
        return x + y.div(keep) * mask


# Swin


def to_windows(x: Tensor, w: int) -> Tensor:
    """Reshape (B, H, W, C) to (B * windows, w * w, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // w, w, W // w, w, C).transpose(2, 3).contiguous().view(-1, w * w, C)


def from_windows(windows: Tensor, w: int, height: int, width: int) -> Tensor:
    """Reshape (B * windows, w * w, C) to (B, H, W, C)."""
    x = windows.view(-1, height // w, width // w, w, w, windows.shape[-1])
    return x.transpose(2, 3).contiguous().view(len(x), height, width, -1)


def shift_mask(height: int, width: int, w: int, shift: int, device: torch.device) -> Tensor:
    """The mask (windows, w * w, w * w), built on the CPU and copied to the device, as published."""
    part = torch.zeros(1, height, width, 1)
    number = 0
    for rows in (slice(0, -w), slice(-w, -shift), slice(-shift, None)):
        for columns in (slice(0, -w), slice(-w, -shift), slice(-shift, None)):
            part[:, rows, columns] = number
            number += 1
    part = to_windows(part, w)[..., 0]  # (windows, w * w)
    difference = part[:, None] - part[:, :, None]
    return difference.masked_fill(difference != 0, MASKED).masked_fill(difference == 0, 0.0).to(device)


class PlainWindowAttention(swin.WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B * windows, N, C)
        rows, N, C = x.shape
        qkv = self.qkv(x).view(rows, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        logits = q @ k.transpose(-2, -1)  # (B * windows, heads, N, N)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        logits = logits + bias.permute(2, 0, 1).contiguous()[None]
        if mask is not None:
            logits = logits.view(-1, len(mask), self.num_heads, N, N) + mask[:, None]
            logits = logits.view(-1, self.num_heads, N, N)
        out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(rows, N, C)
        return self.proj(out)


class PlainSwinBlock(swin.SwinBlock):
    def _attention(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        w, shift = self.attn.window_size, self.attn.shift_size
        y = F.pad(self.norm1(x), (0, 0, 0, -W % w, 0, -H % w))
        Hp, Wp = y.shape[1:3]
        mask = None
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
            mask = shift_mask(Hp, Wp, w, shift, x.device)
        y = from_windows(self.attn(to_windows(y, w), mask), w, Hp, Wp)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        return y[:, :H, :W].contiguous()

    def _mlp(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        return mlp.fc2(F.gelu(mlp.fc1(self.norm2(x))))


class PlainPatchMerging(swin.PatchMerging):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PlainSwinStage(swin.SwinStage):
    def forward_blocks(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


# ViL


class PlainSparseAttention(longformer.SparseAttention):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        B, N, C = x.shape
        G, w, heads, d = self.global_tokens, self.window_size, self.num_heads, C // self.num_heads
        windows = self._neighbor_windows()
        q = (self.scale * self.query(x[:, G:])).view(B, N - G, heads, d).transpose(1, 2).contiguous()
        k, v = self.kv(x).view(B, N, 2, heads, d).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        k_global, v_global = (t[:, :, :G].reshape(B * heads, G, d) for t in (k, v))
        q, k, v = (self._channels_first(t, height, width) for t in (q, k[:, :, G:], v[:, :, G:]))
        rows, columns = q.shape[2:4]
        # Channel, window row, window column, position in the window: products over c, one per neighbour.
        to_global = torch.einsum("bcmnl,btc->bmnlt", q, k_global)
        neighbours = [self._rolled(k, i) for i in windows]
        local = torch.cat([torch.einsum("bcmnl,bcmnt->bmnlt", q, k) for k in neighbours], -1)
        if G:
            to_global = to_global + self.g2l_relative_position_bias[1].repeat(B, 1)[:, None, None, None]
        w2 = w * w
        index = torch.cat([self.relative_position_index[:, i * w2 : (i + 1) * w2] for i in windows], -1)
        bias = self.local_relative_position_bias_table[index.view(-1)].view(w2, index.shape[1], heads)
        bias = bias.permute(2, 0, 1).expand(B, -1, -1, -1).contiguous().view(B * heads, w2, -1)
        local = local + bias[:, None, None]
        invalid = longformer.window_mask(height, width, w, x.device)[:, windows].flatten(1) != 0
        local = local.masked_fill(invalid.view(1, rows, columns, 1, -1), -torch.inf)
        logits = torch.cat((to_global, local), -1)
        weights = (logits - logits.max(-1, keepdim=True)[0]).softmax(-1)
        parts = weights[..., G:].split(w2, -1)
        out = torch.einsum("bmnlt,bcmnt->bcmnl", parts[0], self._rolled(v, windows[0]))
        for i, part in zip(windows[1:], parts[1:], strict=True):
            out = out + torch.einsum("bmnlt,bcmnt->bcmnl", part, self._rolled(v, i))
        out = out + torch.einsum("bmnlt,btc->bcmnl", weights[..., :G], v_global)
        out = out.unflatten(-1, (w, w)).permute(0, 2, 4, 3, 5, 1).reshape(B, heads, rows * w, columns * w, d)
        out = out[:, :, :height, :width].reshape(B, heads, N - G, d).transpose(1, 2).reshape(B, N - G, C)
        out = self.proj(out)
        return torch.cat((self.proj(self._from_global_plain(x)), out), 1) if G else out

    def _from_global_plain(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        G, heads, d = self.global_tokens, self.num_heads, C // self.num_heads
        q = (self.scale * self.query(x[:, :G])).view(B, G, heads, d).transpose(1, 2).reshape(B * heads, G, d)
        k, v = (
            self.kv(x).view(B, N, 2, heads, d).permute(2, 0, 3, 1, 4).reshape(2, B * heads, N, d)
        )  # again, as published
        logits = torch.bmm(q, k.transpose(1, 2)) + self._from_global(N - G).repeat(B, 1, 1)
        weights = (logits - logits.max(-1, keepdim=True)[0]).softmax(-1)
        return torch.bmm(weights, v).view(B, heads, G, d).transpose(1, 2).reshape(B, G, C)

    def _channels_first(self, t: Tensor, height: int, width: int) -> Tensor:
        """Reshape (B, heads, N, d) to (B * heads, d, rows, columns, w * w)."""
        w = self.window_size
        t = t.reshape(-1, height, width, t.shape[-1]).permute(0, 3, 1, 2)
        t = F.pad(t, (0, -width % w, 0, -height % w))
        return (
            t.unflatten(3, (-1, w))
            .unflatten(2, (-1, w))
            .transpose(3, 4)
            .reshape(*t.shape[:2], -(-height // w), -(-width // w), w * w)
        )

    @staticmethod
    def _rolled(t: Tensor, i: int) -> Tensor:
        row, column = longformer.OFFSETS[i]
        return t if i == longformer.OWN else torch.roll(t, (-row, -column), (2, 3))


class PlainFullAttention(longformer.FullAttention):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.proj((self.weights(x, height, width) @ self._qkv(x)[2]).transpose(1, 2).flatten(2))


# CvT


class PlainCvT(cvt.CvT):
    """CvT with feature maps (B, C, H, W) between the layers."""

    def forward_features(self, x: Tensor) -> Tensor:
        for embed, blocks in self._stages():
            x = blocks(embed(x))
        return self.norm(x.permute(0, 2, 3, 1))


class PlainConvEmbed(cvt.ConvEmbed):
    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        H, W = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()).transpose(1, 2).unflatten(2, (H, W)).contiguous()


class PlainPreNorm(cvt.PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class PlainPointwiseConv(cvt.PointwiseConv):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class PlainDepthWiseConv(cvt.DepthWiseConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.bn(self.dw(x)))


class PlainFeedForward(cvt.FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.net
        x = first(x)
        return second(x * torch.sigmoid(1.702 * x))


class PlainCvtAttention(cvt.Attention):
    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        w = min(self.window_size, H, W)
        x = F.pad(x, (0, -W % w, 0, -H % w))
        q, k, v = (self._split(t, w) for t in self.qkv(x).chunk(3, 1))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        rows, columns = x.shape[2] // w, x.shape[3] // w
        out = out.view(len(x), rows, columns, self.num_heads, w, w, -1).permute(0, 3, 6, 1, 4, 2, 5)
        out = out.reshape(len(x), -1, rows * w, columns * w)
        return self.proj_out(out[:, :, :H, :W].contiguous())

    def _split(self, t: Tensor, w: int) -> Tensor:
        """Reshape (B, heads * d, H, W) to (B * windows, heads, w * w, d)."""
        B, _, H, W = t.shape
        t = t.view(B, self.num_heads, -1, H // w, w, W // w, w).permute(0, 3, 5, 1, 4, 6, 2)
        return t.reshape(B * (H // w) * (W // w), self.num_heads, w * w, -1)


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    StochasticDepth: PlainStochasticDepth,
    heads.Prototypes: PlainPrototypes,
    swin.WindowAttention: PlainWindowAttention,
    swin.SwinBlock: PlainSwinBlock,
    swin.PatchMerging: PlainPatchMerging,
    swin.SwinStage: PlainSwinStage,
    longformer.SparseAttention: PlainSparseAttention,
    longformer.FullAttention: PlainFullAttention,
    cvt.CvT: PlainCvT,
    cvt.ConvEmbed: PlainConvEmbed,
    cvt.PreNorm: PlainPreNorm,
    cvt.PointwiseConv: PlainPointwiseConv,
    cvt.DepthWiseConv: PlainDepthWiseConv,
    cvt.FeedForward: PlainFeedForward,
    cvt.Attention: PlainCvtAttention,
}
