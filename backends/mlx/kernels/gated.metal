// out = activation(gate) up: rows of gate's WIDTH numbers and then up's, in float until they are stored. The activation is
// silu, or gelu by tanh if GELU. Both are gate times a sigmoid: 1 + tanh(u) is 2 sigmoid(2 u).
//
// Bytes read for each output number: gate and up, once. The exponent is never above 0, so that nothing overflows.
// Launch: threadgroups (parts of a row, rows); a thread has 4 numbers in a row, by one load of gate and one of up where WIDTH
// is a multiple of 4. T: numbers of both. gate_up (rows, 2 WIDTH); out (rows, WIDTH); WIDTH is read from the shape.
const int width = gate_up_shape[1] / 2, first = 4 * int(thread_position_in_grid.x);
if (first >= width) return;
const size_t row = threadgroup_position_in_grid.y;
const device T* gate = gate_up + row * 2 * width + first;
device T* to = out + row * width + first;
float gates[4], ups[4];
const int count = min(4, width - first);
if (width % 4 == 0) {
    const float4 four = rillet::load4(gate), other = rillet::load4(gate + width);
    for (int i = 0; i < 4; i++) {
        gates[i] = four[i];
        ups[i] = other[i];
    }
} else {
    for (int i = 0; i < count; i++) {
        gates[i] = float(gate[i]);
        ups[i] = float(gate[width + i]);
    }
}
for (int i = 0; i < count; i++) {
    const float x = gates[i];
    const float u = GELU ? 1.59576912f * (x + 0.044715f * x * x * x) : x;      // 2 sqrt(2 / pi)
    const float power = abs(u) > 87.0f ? 0.0f : precise::exp(-abs(u));         // what is less is subnormal
    to[i] = T(x * ((u < 0.0f ? power : 1.0f) / (1.0f + power)) * ups[i]);
}
