// Rows of any length written into a batch's memory, every byte of it once. Rows lie one behind the other, `positions`
// bytes each; a longer one is cut. Each function does what pipeline/rows/ragged.py or texts.py does without a compiler.
#include <cstdint>
#include <cstring>

static inline int64_t kept(int64_t length, int64_t positions) { return length < positions ? length : positions; }

// The bytes of each row, `length` from `start` in `content`, and zeros behind them.
extern "C" void pad(const uint8_t* content, const int64_t* start, const int64_t* length, int64_t rows,
                    int64_t positions, uint8_t* into) {
  for (int64_t row = 0; row < rows; ++row, into += positions) {
    const int64_t real = kept(length[row], positions);
    std::memcpy(into, content + start[row], real);
    std::memset(into + real, 0, positions - real);
  }
}

// Ones at the first `length` positions of each row, and zeros behind them.
extern "C" void first_positions(const int64_t* length, int64_t rows, int64_t positions, uint8_t* into) {
  for (int64_t row = 0; row < rows; ++row, into += positions) {
    const int64_t real = kept(length[row], positions);
    std::memset(into, 1, real);
    std::memset(into + real, 0, positions - real);
  }
}
