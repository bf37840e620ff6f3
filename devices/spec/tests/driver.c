/* What a driver in C makes of the header. The numbers here are written by hand. */
#include "numagpu.h"

#include <assert.h>
#include <stdint.h>

static_assert(NUMAGPU_MAGIC == 0x5550474e, "NGPU");
static_assert(NUMAGPU_VENDOR_ID == 0x1234 && NUMAGPU_DEVICE_ID == 0x6770, "identity");
static_assert(NUMAGPU_BLOCK_IDENTITY_BAR == 0 && NUMAGPU_BLOCK_MSIX_BAR == 1 && NUMAGPU_BLOCK_DOORBELL_BAR == 2, "BARs");
static_assert(NUMAGPU_IDENTITY_MAGIC == 0, "the first register");
static_assert(NUMAGPU_BOOT_STATUS == 0x104, "in a block with one instance");
static_assert(NUMAGPU_QUEUE_RING_BASE(0) == 0x8000, "of the first instance");
static_assert(NUMAGPU_QUEUE_RPTR(3) == 0x8320, "of another instance");
static_assert(NUMAGPU_QUEUE_RPTR(1 + 2) == 0x8320, "of a sum");
static_assert(NUMAGPU_PARTITION_TOKEN(7) == 0x2720 && NUMAGPU_PARTITION_TOKEN_BYTES == 8, "64 bits");
static_assert(NUMAGPU_QUEUE_RING_BASE_WRITABLE == 0xffffffffffffff00, "a mask of 64 bits");
static_assert(NUMAGPU_IRQ_STATUS_W1C == 0xffffffff, "write one to clear");
static_assert(NUMAGPU_MSIX_CONTROL_RESET == 1, "masked");
static_assert(NUMAGPU_DOORBELL_WPTR(2) == 0x10, "doorbell of queue 2");
static_assert(NUMAGPU_CAPS_HBM_APERTURE == 4 && NUMAGPU_IRQ_BITS_QUEUE0 == 0x100, "flags");
static_assert(NUMAGPU_BOOT_STATE_READY == 2 && NUMAGPU_COHERENCE_NO_FD == 2, "codes");
static_assert(NUMAGPU_SDMA_ATOMIC_OP_SHIFT == 25 && NUMAGPU_ATOMIC_OP_MIN_SIGNED == 0x11, "an operation");
static_assert(NUMAGPU_SDMA_TIMESTAMP_GET_GLOBAL_FIRST == 0x20d, "opcode and sub-opcode");

/* A linear copy, word by word. */
void copy_linear(uint32_t *packet, uint64_t source, uint64_t destination, uint32_t bytes)
{
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_HEADER] = NUMAGPU_SDMA_COPY_LINEAR_FIRST;
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_COUNT] = (bytes - 1) & NUMAGPU_SDMA_COUNT_MASK;
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_PARAMETER] = 0;
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_SOURCE_LO] = (uint32_t)source;
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_SOURCE_HI] = (uint32_t)(source >> 32);
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_DESTINATION_LO] = (uint32_t)destination;
	packet[NUMAGPU_SDMA_COPY_LINEAR_WORD_DESTINATION_HI] = (uint32_t)(destination >> 32);
}

int main(void)
{
	static const uint32_t expected[NUMAGPU_SDMA_COPY_LINEAR_WORDS] = {
		1, 0xfff, 0, 0x9abc0000, 0x12345678, 0x4000, 1,
	};
	uint32_t packet[NUMAGPU_SDMA_COPY_LINEAR_WORDS];
	unsigned i;

	copy_linear(packet, 0x123456789abc0000, 0x100004000, 0x1000);
	for (i = 0; i < NUMAGPU_SDMA_COPY_LINEAR_WORDS; i++)
		if (packet[i] != expected[i])
			return 1;
	return 0;
}
