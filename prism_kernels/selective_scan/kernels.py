"""Channelwise kernels: channels c = h P + p and states in the lanes, time as the loop.

Complex numbers are two planes, `_r` and `_i`. Static B and C; the step size is per head, so channel c
reads head c // P. Sums over batch and channels leave as partial sums, one per (batch, channel).
"""

import triton
import triton.language as tl


@triton.jit
def times(a_r, a_i, b_r, b_i):
    """a b."""
    return a_r * b_r - a_i * b_i, a_r * b_i + a_i * b_r


@triton.jit
def times_conj(a_r, a_i, b_r, b_i):
    """a conj(b)."""
    return a_r * b_r + a_i * b_i, a_i * b_r - a_r * b_i


@triton.jit
def inverse(A_r, A_i):
    """1 / A, and 0 where A vanishes; third, where it vanishes. In float64: its error meets every token."""
    vanishing = (tl.abs(A_r) < 1e-20) & (tl.abs(A_i) < 1e-20)
    r = A_r.to(tl.float64)
    i = A_i.to(tl.float64)
    norm = tl.where(vanishing, 1.0, r * r + i * i)
    inv_r = tl.where(vanishing, 0.0, r / norm).to(A_r.dtype)
    return inv_r, tl.where(vanishing, 0.0, -i / norm).to(A_r.dtype), vanishing


@triton.jit
def growth(x, TERMS: tl.constexpr):
    """exp(x) and exp(x) - 1, both to rounding, for x <= 0 (at most 88).

    With x = k log 2 + r, one series for exp(r) - 1 gives both. (tl.exp is off by several units in the
    last place, and its error has a sign, which a recurrence adds up.)
    """
    near = tl.abs(x) < 0.35
    k = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -126.0), 127.0)
    if x.dtype == tl.float64:
        r = tl.where(near, x, 0.0)
    else:
        r = tl.where(x < -87.0, 0.0, (x - k * 0.693359375) + k * 2.12194440e-4)
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS, 1, -1):
        series = 1.0 + r * series * (1.0 / i)
    rise = r * series
    if x.dtype == tl.float64:
        e = tl.exp(x)
        return e, tl.where(near, rise, e - 1.0)
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    gone = x < -87.0
    return tl.where(gone, 0.0, power + power * rise), tl.where(gone, -1.0, power * rise + (power - 1.0))


@triton.jit
def rotation(y):
    """sin(y), cos(y) and 1 - cos(y), the last accurate near 0 too.

    tl.sin and tl.cos carry a reduction for any float32 with a table in local memory. Phases here are
    small: three exact parts of pi/2 hold to |y| = 1e4, and beyond it float32 phases mean little.
    """
    if y.dtype == tl.float64:
        half = tl.sin(0.5 * y)
        return tl.sin(y), tl.cos(y), 2.0 * half * half
    turns = tl.floor(y * 0.6366197723675814 + 0.5)
    r = ((y - turns * 1.5703125) - turns * 4.837512969970703e-4) - turns * 7.549789948768648e-8
    r = tl.minimum(tl.maximum(r, -1.0), 1.0)
    q = turns - 4.0 * tl.floor(turns * 0.25)
    z = r * r
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    rest = z * z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800))))
    lead = 1.0 - 0.5 * z
    cos = lead + (((1.0 - lead) - 0.5 * z) + rest)
    versine = 0.5 * z - rest
    odd = (q == 1.0) | (q == 3.0)
    s = tl.where(odd, cos, sin)
    c = tl.where(odd, sin, cos)
    s = tl.where(q >= 2.0, -s, s)
    c = tl.where((q == 1.0) | (q == 2.0), -c, c)
    return s, c, tl.where(q == 0.0, versine, 1.0 - c)


@triton.jit
def discretise(dt, A_r, A_i, inv_r, inv_i, vanishing, EXPM1_TERMS: tl.constexpr):
    """a = exp(dt A) and w = (a - 1) / A, with a numerator exact to rounding in norm; w = dt where A = 0."""
    x = dt * A_r
    gain, rise = growth(x, EXPM1_TERMS)
    sin, cos, versine = rotation(dt * A_i)
    a_i = gain * sin
    w_r, w_i = times(rise * cos - versine, a_i, inv_r, inv_i)
    return gain * cos, a_i, tl.where(vanishing, dt, w_r), w_i


@triton.jit
def weight_slope(dt, A_r, A_i, inv_r, inv_i, a_r, a_i, w_r, w_i, TERMS: tl.constexpr):
    """chi = dw / dA = (dt a - w) / A, by its series dt^2 sum_k (k+1)/(k+2)! (dt A)^k near 0."""
    near = dt * tl.maximum(tl.abs(A_r), tl.abs(A_i)) < 0.25
    z_r = tl.where(near, dt * A_r, 0.0)
    z_i = tl.where(near, dt * A_i, 0.0)
    far_r, far_i = times(dt * a_r - w_r, dt * a_i - w_i, inv_r, inv_i)
    s_r = tl.full(z_r.shape, 1.0, z_r.dtype)
    s_i = tl.zeros_like(s_r)
    for k in tl.static_range(TERMS, 0, -1):
        p_r, p_i = times(s_r, s_i, z_r, z_i)
        s_r = 1.0 + p_r * ((k + 1.0) / (k * (k + 2.0)))
        s_i = p_i * ((k + 1.0) / (k * (k + 2.0)))
    scale = 0.5 * dt * dt
    return tl.where(near, scale * s_r, far_r), tl.where(near, scale * s_i, far_i)


@triton.jit
def step(h_r, h_i, a_r, a_i, w_r, w_i, B_r, B_i, u):
    """h <- a h + w B u."""
    n_r, n_i = times(a_r, a_i, h_r, h_i)
    d_r, d_i = times(w_r, w_i, B_r, B_i)
    return n_r + d_r * u, n_i + d_i * u


@triton.jit
def load_pair(p, mask):
    """Real and imaginary part of complex numbers stored as pairs."""
    return tl.load(p, mask=mask, other=0.0), tl.load(p + 1, mask=mask, other=0.0)


@triton.jit
def store_pair(p, r, i, mask):
    """The inverse of `load_pair`."""
    tl.store(p, r, mask=mask)
    tl.store(p + 1, i, mask=mask)


@triton.jit(do_not_specialize=["T"])
def scan_forward(
    # inputs
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    h0_ptr,
    # outputs
    y_ptr,
    hT_ptr,
    states_ptr,
    # sizes and strides
    T,
    u_stride_b,
    u_stride_t,
    u_stride_h,
    u_stride_p,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    B_stride_p,
    C_stride_p,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    EXPM1_TERMS: tl.constexpr,
):
    """y, the final state and the state before every SEGMENT tokens. Grid: (batch x channel blocks,)."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_c = o_c < CHANNELS
    mask = m_c[:, None] & (o_n < N)
    head = o_c // P
    lane = o_c % P
    o_state = (o_c[:, None] * N + o_n) * 2
    o_weight = head[:, None].to(tl.int64) * (N * 2) + o_n * 2

    A_r, A_i = load_pair(A_ptr + o_weight, mask)
    B_r, B_i = load_pair(B_ptr + weight_offset(head, lane, o_n, B_stride_p, P, N), mask)
    C_r, C_i = load_pair(C_ptr + weight_offset(head, lane, o_n, C_stride_p, P, N), mask)
    inv_r, inv_i, vanishing = inverse(A_r, A_i)
    h_r, h_i = load_pair(h0_ptr + i_b * (CHANNELS * N * 2) + o_state, mask)

    p_u = u_ptr + i_b * u_stride_b + head.to(tl.int64) * u_stride_h + lane * u_stride_p
    p_dt = dt_ptr + i_b * dt_stride_b + head.to(tl.int64) * dt_stride_h
    p_y = y_ptr + i_b * T * CHANNELS + o_c
    segments = tl.cdiv(T, SEGMENT)
    p_states = states_ptr + i_b * segments * (CHANNELS * N * 2) + o_state
    for s in range(segments):
        store_pair(p_states, h_r, h_i, mask)
        p_states += CHANNELS * N * 2
        for _ in range(s * SEGMENT, tl.minimum((s + 1) * SEGMENT, T)):
            b_u = tl.load(p_u, mask=m_c, other=0.0)[:, None]
            b_dt = tl.load(p_dt, mask=m_c, other=0.0)[:, None]
            a_r, a_i, w_r, w_i = discretise(b_dt, A_r, A_i, inv_r, inv_i, vanishing, EXPM1_TERMS)
            h_r, h_i = step(h_r, h_i, a_r, a_i, w_r, w_i, B_r, B_i, b_u)
            tl.store(p_y, 2.0 * tl.sum(C_r * h_r + C_i * h_i, axis=1), mask=m_c)
            p_u += u_stride_t
            p_dt += dt_stride_t
            p_y += CHANNELS
    store_pair(hT_ptr + i_b * (CHANNELS * N * 2) + o_state, h_r, h_i, mask)


@triton.jit
def weight_offset(head, lane, o_n, stride_p, P: tl.constexpr, N: tl.constexpr):
    """Offsets of B or C: [H,N] (stride_p = 0) or [H,P,N] (stride_p = 2 N)."""
    row = tl.where(stride_p > 0, head * P + lane, head)
    return row[:, None].to(tl.int64) * (N * 2) + o_n * 2


@triton.jit(do_not_specialize=["T"])
def scan_backward(
    # inputs
    g_ptr,
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    states_ptr,
    dhT_ptr,
    # outputs
    du_ptr,
    ddt_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dh0_ptr,
    scratch_ptr,
    # sizes and strides
    T,
    u_stride_b,
    u_stride_t,
    u_stride_h,
    u_stride_p,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    B_stride_p,
    C_stride_p,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    EXPM1_TERMS: tl.constexpr,
    SLOPE_TERMS: tl.constexpr,
):
    """All gradients, ddt per channel and dA, dB, dC per (batch, channel). Grid: as the forward.

    Segments go from last to first. Each is run forward from its stored state, which leaves the state
    before every token in the program's scratch, and then backward.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_c = o_c < CHANNELS
    mask = m_c[:, None] & (o_n < N)
    head = o_c // P
    lane = o_c % P
    o_state = (o_c[:, None] * N + o_n) * 2
    o_weight = head[:, None].to(tl.int64) * (N * 2) + o_n * 2
    o_tile = (tl.arange(0, BLOCK_C)[:, None] * BLOCK_N + o_n) * 2

    A_r, A_i = load_pair(A_ptr + o_weight, mask)
    B_r, B_i = load_pair(B_ptr + weight_offset(head, lane, o_n, B_stride_p, P, N), mask)
    C_r, C_i = load_pair(C_ptr + weight_offset(head, lane, o_n, C_stride_p, P, N), mask)
    inv_r, inv_i, vanishing = inverse(A_r, A_i)
    m_r, m_i = load_pair(dhT_ptr + i_b * (CHANNELS * N * 2) + o_state, mask)
    dA_r = tl.zeros_like(A_r)
    dA_i = tl.zeros_like(A_r)
    dB_r = tl.zeros_like(A_r)
    dB_i = tl.zeros_like(A_r)
    dC_r = tl.zeros_like(A_r)
    dC_i = tl.zeros_like(A_r)

    p_u = u_ptr + i_b * u_stride_b + head.to(tl.int64) * u_stride_h + lane * u_stride_p
    p_dt = dt_ptr + i_b * dt_stride_b + head.to(tl.int64) * dt_stride_h
    o_flat = i_b * T * CHANNELS + o_c
    p_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (SEGMENT * BLOCK_C * BLOCK_N * 2) + o_tile
    segments = tl.cdiv(T, SEGMENT)
    for i in range(segments):
        first = (segments - 1 - i) * SEGMENT
        tokens = tl.minimum(SEGMENT, T - first)
        row = i_b * segments + (segments - 1 - i)
        h_r, h_i = load_pair(states_ptr + row * (CHANNELS * N * 2) + o_state, mask)
        for j in range(tokens):
            t = (first + j).to(tl.int64)
            store_pair(p_scratch + j * (BLOCK_C * BLOCK_N * 2), h_r, h_i, mask)
            b_u = tl.load(p_u + t * u_stride_t, mask=m_c, other=0.0)[:, None]
            b_dt = tl.load(p_dt + t * dt_stride_t, mask=m_c, other=0.0)[:, None]
            a_r, a_i, w_r, w_i = discretise(b_dt, A_r, A_i, inv_r, inv_i, vanishing, EXPM1_TERMS)
            h_r, h_i = step(h_r, h_i, a_r, a_i, w_r, w_i, B_r, B_i, b_u)
        tl.debug_barrier()

        for i_rev in range(tokens):
            j = tokens - 1 - i_rev
            t = (first + j).to(tl.int64)
            b_u = tl.load(p_u + t * u_stride_t, mask=m_c, other=0.0)[:, None]
            b_dt = tl.load(p_dt + t * dt_stride_t, mask=m_c, other=0.0)[:, None]
            b_g = 2.0 * tl.load(g_ptr + o_flat + t * CHANNELS, mask=m_c, other=0.0)[:, None]
            h_r, h_i = load_pair(p_scratch + j * (BLOCK_C * BLOCK_N * 2), mask)
            a_r, a_i, w_r, w_i = discretise(b_dt, A_r, A_i, inv_r, inv_i, vanishing, EXPM1_TERMS)
            # the part of h_t that decayed, and the part that the token drove
            old_r, old_i = times(a_r, a_i, h_r, h_i)
            wB_r, wB_i = times(w_r, w_i, B_r, B_i)
            dC_r += b_g * (old_r + wB_r * b_u)
            dC_i += b_g * (old_i + wB_i * b_u)
            l_r = b_g * C_r + m_r
            l_i = b_g * C_i + m_i
            du = tl.sum(l_r * wB_r + l_i * wB_i, axis=1)
            tl.store(du_ptr + o_flat + t * CHANNELS, du, mask=m_c)
            # gradients of w B, of w, and of theta = dt A through exp
            v_r = l_r * b_u
            v_i = l_i * b_u
            e_r, e_i = times_conj(v_r, v_i, w_r, w_i)
            dB_r += e_r
            dB_i += e_i
            dw_r, dw_i = times_conj(v_r, v_i, B_r, B_i)
            q_r, q_i = times_conj(l_r, l_i, old_r, old_i)
            ddt = tl.sum(q_r * A_r + q_i * A_i + dw_r * a_r + dw_i * a_i, axis=1)
            tl.store(ddt_ptr + o_flat + t * CHANNELS, ddt, mask=m_c)
            x_r, x_i = weight_slope(b_dt, A_r, A_i, inv_r, inv_i, a_r, a_i, w_r, w_i, SLOPE_TERMS)
            e_r, e_i = times_conj(dw_r, dw_i, x_r, x_i)
            dA_r += b_dt * q_r + e_r
            dA_i += b_dt * q_i + e_i
            m_r, m_i = times_conj(l_r, l_i, a_r, a_i)
        tl.debug_barrier()

    o_sum = i_b * (CHANNELS * N * 2) + o_state
    store_pair(dA_ptr + o_sum, dA_r, dA_i, mask)
    store_pair(dB_ptr + o_sum, dB_r, dB_i, mask)
    store_pair(dC_ptr + o_sum, dC_r, dC_i, mask)
    store_pair(dh0_ptr + o_sum, m_r, m_i, mask)
