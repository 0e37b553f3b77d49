// Rows as a file has them -> fragment order. matrices.py launches this while a model loads; formats.cuh says what lies where.
#include "formats.cuh"

constexpr int REPACK_WARPS = 4;

// file: `rows` rows, row_bytes each, of `columns` columns; they become the row tiles of the matrix from first_row_tile on,
// rows and columns beyond the end zeros. A warp for each row tile and each 256 columns: grid (columns / 256, row tiles /
// REPACK_WARPS).
template <class F>
__global__ void __launch_bounds__(REPACK_WARPS * WARP)
repack(const u8* file, i64 row_bytes, int rows, int columns, u8* blob, u8* strip, int first_row_tile) {
    int lane = threadIdx.x % WARP, tiles = tiles_of(columns), row_tile = blockIdx.y * REPACK_WARPS + threadIdx.x / WARP;
    if (row_tile * TILE_ROWS >= rows) return;
    i64 place = static_cast<i64>(first_row_tile + row_tile) * tiles;
    const u8* lines[2];
    for (int row = 0; row < 2; row++) {
        int number = row_tile * TILE_ROWS + lane / 4 + 8 * row;
        lines[row] = number < rows ? file + number * row_bytes : nullptr;
    }
    typename F::Header header;
    for (int in = 0; in < SUPER_TILES; in++) {
        int number = blockIdx.x * SUPER_TILES + in, column = number * TILE_COLUMNS;
        if (number >= tiles) return;
        if (in % F::STRIP_TILES == 0) {
            header.clear();
            i64 block = static_cast<i64>(column / F::BLOCK) * F::BLOCK_BYTES;
            for (int row = 0; row < 2; row++)
                if (lines[row]) header.put(row, lane, lines[row] + block, column + 32 < columns);
            if constexpr (F::STRIP_BYTES > 0) header.write(strip + (place + number) / F::STRIP_TILES * F::STRIP_BYTES, lane);
        }
        F tile;
        tile.clear();
        for (int row = 0; row < 2; row++)
            for (int at = 0; at < 16; at++) {
                int c = column + lane % 4 * 16 + at;
                if (lines[row] && c < columns)
                    tile.put(row, at, F::quant(lines[row] + static_cast<i64>(c / F::BLOCK) * F::BLOCK_BYTES, c % F::BLOCK));
            }
        tile.write(blob + (place + number) * F::TILE_BYTES, lane);
    }
}
