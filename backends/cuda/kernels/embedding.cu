// Rows of a packed matrix by number, as float32: token embeddings. products.py launches this.
#include "fragments.cuh"

constexpr int TAKE_THREADS = 128;

// out (T, columns) float32 = the rows ids (T), each weight as gguf.quants has it. One block a row.
template <class F>
__global__ void __launch_bounds__(TAKE_THREADS)
take_rows(const int* ids, const u8* blob, const u8* strip, float* out, int columns) {
    int id = ids[blockIdx.x], half = id % TILE_ROWS / 8, tiles = tiles_of(columns);
    float* to = out + static_cast<i64>(blockIdx.x) * columns;
    for (int part = threadIdx.x; part * 16 < columns; part += TAKE_THREADS) {
        int lane = id % 8 * 4 + part % 4, number = part / 4;
        Cursor<F> rows(blob, strip, id / TILE_ROWS, tiles);
        rows.advance(number / SUPER_TILES);
        F tile;
        typename F::Header header;
        rows.read(tile, number % SUPER_TILES, lane);
        rows.read_header(header, number % SUPER_TILES, lane);
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (row == half)
#pragma unroll
                for (int in = 0; in < F::STRIP_TILES; in++)
                    if (in == number % F::STRIP_TILES) {
                        Factors factors = header.factors(in, row, lane);
#pragma unroll
                        for (int at = 0; at < 16; at++)
                            if (part * 16 + at < columns) to[part * 16 + at] = weight(tile, row, factors, at);
                    }
    }
}
