// Rows of any length written into a batch's memory, every byte of it once. Rows lie one behind the other, `positions`
// bytes each; a longer one is cut. Numbers of rows have 4 or 8 bytes, as `bytes` says. Each function does what
// pipeline/rows/ragged.py or texts.py does without a compiler.
#include <cstdint>
#include <cstring>

static inline int64_t kept(int64_t length, int64_t positions) { return length < positions ? length : positions; }

template <class Number>
static void pad_rows(const uint8_t* content, const Number* start, const Number* stop, int64_t rows, int64_t positions,
                     uint8_t* into) {
  for (int64_t row = 0; row < rows; ++row, into += positions) {
    const int64_t real = kept(stop[row] - start[row], positions);
    std::memcpy(into, content + start[row], real);
    std::memset(into + real, 0, positions - real);
  }
}

template <class Number>
static void mark_rows(const Number* length, int64_t rows, int64_t positions, uint8_t* into) {
  for (int64_t row = 0; row < rows; ++row, into += positions) {
    const int64_t real = kept(length[row], positions);
    std::memset(into, 1, real);
    std::memset(into + real, 0, positions - real);
  }
}

// The bytes of each row, from `start` up to `stop` in `content`, and zeros behind them.
extern "C" void pad(const uint8_t* content, const void* start, const void* stop, int64_t bytes, int64_t rows,
                    int64_t positions, uint8_t* into) {
  if (bytes == 4)
    pad_rows(content, (const int32_t*)start, (const int32_t*)stop, rows, positions, into);
  else
    pad_rows(content, (const int64_t*)start, (const int64_t*)stop, rows, positions, into);
}

// Ones at the first `length` positions of each row, and zeros behind them.
extern "C" void first_positions(const void* length, int64_t bytes, int64_t rows, int64_t positions, uint8_t* into) {
  if (bytes == 4)
    mark_rows((const int32_t*)length, rows, positions, into);
  else
    mark_rows((const int64_t*)length, rows, positions, into);
}
