// Copies pages within a layer's pools, in place: the pools are inputs, the token an output, as write_cache has it. A pair
// (source, target) with a page that is not there is left out (padding has -1). No target may be in another pair.
//
// Bytes read for each byte written: one, 16 at a time, as 32 tokens of a head are a multiple of 16 bytes in every type.
// Launch: threadgroups (parts of a page, pairs, pools: keys, values, and their scales where C has scales).
// C: numbers of the pools. pairs (n, 2); pools (slots, KV, D); scales (slots, KV) or unused.
const uint3 group = threadgroup_position_in_grid;
if (thread_position_in_grid.x == 0 && group.y == 0 && group.z == 0) token[0] = 1.0f;
const int source = pairs[2 * group.y], target = pairs[2 * group.y + 1], pages = key_pool_shape[0] / rillet::PAGE;
if (source < 0 || source >= pages || target < 0 || target >= pages) return;
const bool scales = group.z >= 2, values = group.z % 2 == 1;
const size_t heads = size_t(rillet::PAGE) * key_pool_shape[1];
const size_t pieces = (scales ? heads * sizeof(float) : heads * key_pool_shape[2] * sizeof(C)) / sizeof(uint4);
device uint4* pool = scales ? reinterpret_cast<device uint4*>(const_cast<device float*>(values ? value_scales : key_scales))
                            : reinterpret_cast<device uint4*>(const_cast<device C*>(values ? value_pool : key_pool));
const device uint4* from = pool + source * pieces;
device uint4* to = pool + target * pieces;
for (size_t at = thread_position_in_grid.x; at < pieces; at += threads_per_grid.x) to[at] = from[at];
