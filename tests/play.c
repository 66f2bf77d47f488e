/* Calls the kernels of a library one after the other, without TVM's runtime: what it needs of it stands here.

   play LIBRARY PLAN DATA OUT: PLAN has a line a buffer, "b BYTES BITS CODE OFFSET" (OFFSET into DATA, -1: nothing yet),
   and a line a call, "c FUNCTION COUNT BUFFERS...". The last buffer is written to OUT. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int32_t type, zero;
  void *value;
} Any;

typedef struct {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  void *sync;
  int32_t tasks;
} Parallel;

enum { CPU = 1, ANY_TENSOR = 7, MOST = 512 };

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputs("\n", stderr);
}

static int launch(int (*task)(int, Parallel *, void *), void *closure, int tasks) {
  int count = tasks ? tasks : 2; /* one after the other, as two threads would share the work */
  for (int i = 0; i < count; ++i) {
    Parallel parallel = {0, count};
    if (task(i, &parallel, closure)) return -1;
  }
  return 0;
}

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
static void *take(int type, int id, uint64_t bytes, int code, int bits) { return aligned(bytes); }
static int give(int type, int id, void *memory) {
  free(memory);
  return 0;
}

static void provide(void *library, const char *name, void *function) {
  void **slot = dlsym(library, name);
  if (slot) *slot = function;
}

int main(int argc, char **argv) {
  void *library = argc == 5 ? dlopen(argv[1], RTLD_LAZY | RTLD_GLOBAL) : 0;
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  provide(library, "__TVMBackendParallelLaunch", launch);
  provide(library, "__TVMBackendAllocWorkspace", take);
  provide(library, "__TVMBackendFreeWorkspace", give);

  FILE *plan = fopen(argv[2], "r"), *data = fopen(argv[3], "rb"), *out = fopen(argv[4], "wb");
  static Tensor tensors[MOST];
  static int64_t lengths[MOST];
  int buffers = 0;
  char kind, name[256];
  while (fscanf(plan, " %c", &kind) == 1) {
    if (kind == 'b') {
      long bytes, bits, code, offset;
      if (buffers == MOST || fscanf(plan, "%ld %ld %ld %ld", &bytes, &bits, &code, &offset) != 4) return 2;
      Tensor *t = &tensors[buffers];
      *t = (Tensor){aligned(bytes), CPU, 0, 1, code, bits, 1, &lengths[buffers], 0, 0};
      memset(t->data, 0xff, bytes); /* what nobody writes is not a number */
      lengths[buffers++] = bytes / (bits / 8);
      if (offset >= 0 && (fseek(data, offset, SEEK_SET) || fread(t->data, 1, bytes, data) != (size_t)bytes)) return 3;
    } else {
      int count, index;
      Any arguments[32] = {{0}}, result = {0};
      if (fscanf(plan, "%255s %d", name, &count) != 2 || count > 32) return 4;
      for (int i = 0; i < count; ++i) {
        if (fscanf(plan, "%d", &index) != 1) return 5;
        arguments[i] = (Any){ANY_TENSOR, 0, &tensors[index]};
      }
      int (*kernel)(void *, Any *, int32_t, Any *) = dlsym(library, name);
      if (!kernel || kernel(0, arguments, count, &result)) return fprintf(stderr, "%s failed\n", name), 6;
    }
  }
  fwrite(tensors[buffers - 1].data, 1, lengths[buffers - 1] * 4, out);
  return fclose(out);
}
