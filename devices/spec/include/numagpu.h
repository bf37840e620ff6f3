/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Registers, packets and status codes of the numagpu device, for drivers in C and C++.
 * Made by `cargo xtask docs` from the tables of numagpu-spec: do not edit. docs/registers.md says how a driver
 * uses the device.
 *
 * NUMAGPU_<BLOCK>_<REGISTER> is the offset of a register in its BAR; in a block with several instances it is a
 * macro that takes the instance, from 0. With a suffix: _BYTES its width, _WRITABLE the bits that a write replaces,
 * _W1C the bits that writing a one clears, _RESET its value after reset where that is fixed and not 0. All are
 * little-endian. NUMAGPU_BLOCK_<BLOCK> with _BAR, _BASE, _STRIDE and _COUNT says where a block's instances are.
 */
#ifndef NUMAGPU_H
#define NUMAGPU_H

/* Numbers */
/* Vendor id used by default: the id that Bochs and QEMU use for devices without a registered vendor. */
#define NUMAGPU_VENDOR_ID 0x1234u
/* Device id used by default, unassigned under `VENDOR_ID` in QEMU's `docs/specs/pci-ids`. */
#define NUMAGPU_DEVICE_ID 0x6770u
/* Class code 12h 00h 00h: processing accelerator (PCI Code and ID Assignment 1.11, section 1.19). */
#define NUMAGPU_CLASS_CODE 0x120000u
/* BAR that holds the registers of `regs`; 32-bit, not prefetchable: such a BAR has to lie below 4 GiB behind a bridge, however wide it is (PCI-to-PCI Bridge 1.2, section 3.2.5.8). */
#define NUMAGPU_BAR_REGISTERS 0u
/* Size of `BAR_REGISTERS` in bytes. */
#define NUMAGPU_BAR_REGISTERS_SIZE 0x10000u
/* BAR that holds the MSI-X table and pending bits and nothing else; 32-bit, not prefetchable. */
#define NUMAGPU_BAR_MSIX 1u
/* Size of `BAR_MSIX` in bytes. */
#define NUMAGPU_BAR_MSIX_SIZE 0x2000u
/* BAR that holds the doorbells; 64-bit, not prefetchable, so it takes BAR 3 as its upper half. */
#define NUMAGPU_BAR_DOORBELLS 2u
/* Size of `BAR_DOORBELLS` in bytes. */
#define NUMAGPU_BAR_DOORBELLS_SIZE 0x1000u
/* BAR that holds the HBM, in a GPU whose `CAPS` say `HBM_APERTURE`; 64-bit, prefetchable, so it takes BAR 5 as its upper half. Partition `p` starts at `PARTITION[p].HBM_BASE - PARTITION[0].HBM_BASE`. Its size is a power of two; behind the last partition it reads as ones and drops writes, as Linux' `nvgrace-gpu` does. */
#define NUMAGPU_BAR_APERTURE 4u
/* Offset of the MSI-X table in `BAR_MSIX`. */
#define NUMAGPU_MSIX_TABLE_OFFSET 0u
/* Offset of the MSI-X pending bit array in `BAR_MSIX`, on a page of its own. */
#define NUMAGPU_MSIX_PBA_OFFSET 0x1000u
/* Bytes between the doorbells of two queues, and between their kicks. */
#define NUMAGPU_DOORBELL_STRIDE 8u
/* Offset of the kicks in `BAR_DOORBELLS`. */
#define NUMAGPU_KICK_OFFSET 0x800u
/* MSI-X vector of faults and ownership events. */
#define NUMAGPU_VECTOR_EVENTS 0u
/* MSI-X vector of queue 0; queue `q` has `VECTOR_QUEUE0 + q`. */
#define NUMAGPU_VECTOR_QUEUE0 1u
/* Number of MSI-X vectors: one for events and one for each of `MAX_QUEUES` queues. */
#define NUMAGPU_VECTOR_COUNT 9u
/* Partitions that the register map has room for. */
#define NUMAGPU_MAX_PARTITIONS 8u
/* Queues that the register map has room for. */
#define NUMAGPU_MAX_QUEUES 8u
/* Links that the register map has room for. */
#define NUMAGPU_MAX_LINKS 0x20u
/* Value of `IDENTITY.MAGIC`: `NGPU` in ASCII, little-endian. */
#define NUMAGPU_MAGIC 0x5550474eu
/* Value of `IDENTITY.VERSION`: major in the upper half, minor in the lower. A driver refuses another major. */
#define NUMAGPU_VERSION 0x20001u
/* `CONTROL` bit that starts the boot. */
#define NUMAGPU_BOOT_START 1u
/* Value of `LINK.PEER` for the link to the CPU. */
#define NUMAGPU_LINK_PEER_CPU 0xffffffffu
/* Value of `PARTITION.PXM` for HBM that is in no proximity domain. */
#define NUMAGPU_NO_PXM 0xffffffffu
/* Value of `PARTITION.LEASE_LEFT_MS` for a lease without end. */
#define NUMAGPU_LEASE_ENDLESS 0xffffffffu
/* Position of the event in `PARTITION.HISTORY_STEP`; the state before is in bits 7:0. */
#define NUMAGPU_HISTORY_EVENT_SHIFT 8u
/* Position of the state after in `PARTITION.HISTORY_STEP`. */
#define NUMAGPU_HISTORY_TO_SHIFT 0x10u
/* Bytes of a page that is retired, and that `RAS` addresses are multiples of. */
#define NUMAGPU_RAS_PAGE 0x1000u
/* Pages that can be retired. */
#define NUMAGPU_MAX_RETIRED 0x100u
/* Value of `RAS.ENTRY` behind the last retired page. */
#define NUMAGPU_NO_ENTRY 0xffffffffffffffffull
/* `QUEUE.CONTROL` bit that enables the queue. */
#define NUMAGPU_QUEUE_ENABLE 1u
/* `QUEUE.CONTROL` bit that resets the queue: stopped, pointers and fault cleared. */
#define NUMAGPU_QUEUE_RESET 2u
/* Highest `QUEUE.PRIORITY`. */
#define NUMAGPU_PRIORITY_MAX 3u
/* Smallest ring in bytes. */
#define NUMAGPU_RING_MIN 0x100u
/* Largest ring in bytes. */
#define NUMAGPU_RING_MAX 0x1000000u
/* No operation; bits 29:16 of the header give the number of further words to skip. */
#define NUMAGPU_SDMA_OP_NOP 0u
/* Copy; sub-opcode `SUBOP_COPY_LINEAR` or `SUBOP_COPY_SUB_WINDOW`. */
#define NUMAGPU_SDMA_OP_COPY 1u
/* Write of words that follow in the packet; sub-opcode `SUBOP_WRITE_LINEAR`. */
#define NUMAGPU_SDMA_OP_WRITE 2u
/* Store of one word when all packets before are done. */
#define NUMAGPU_SDMA_OP_FENCE 5u
/* Interrupt. */
#define NUMAGPU_SDMA_OP_TRAP 6u
/* Wait until a word of memory compares with a reference as asked. */
#define NUMAGPU_SDMA_OP_POLL_REGMEM 8u
/* Atomic operation on a word of memory, one of `AtomicOp`. */
#define NUMAGPU_SDMA_OP_ATOMIC 0xau
/* Fill with a constant. */
#define NUMAGPU_SDMA_OP_CONST_FILL 0xbu
/* Device time; sub-opcode one of the `SUBOP_TIMESTAMP`s. */
#define NUMAGPU_SDMA_OP_TIMESTAMP 0xdu
/* Linear copy. */
#define NUMAGPU_SDMA_SUBOP_COPY_LINEAR 0u
/* Copy of a box of elements from one surface to another, both with pitches. */
#define NUMAGPU_SDMA_SUBOP_COPY_SUB_WINDOW 4u
/* Linear write. */
#define NUMAGPU_SDMA_SUBOP_WRITE_LINEAR 0u
/* Sets the queue's local time. */
#define NUMAGPU_SDMA_SUBOP_TIMESTAMP_SET 0u
/* Stores the queue's local time: the device clock, moved by the last set since the queue was enabled. */
#define NUMAGPU_SDMA_SUBOP_TIMESTAMP_GET 1u
/* Stores the device clock, as `CLOCK.NS` has it. */
#define NUMAGPU_SDMA_SUBOP_TIMESTAMP_GET_GLOBAL 2u
/* Words of a linear copy: header, bytes - 1, parameter, source low/high, destination low/high. */
#define NUMAGPU_SDMA_COPY_LINEAR_WORDS 7u
/* Words of a linear write before its data: header, destination low/high, words - 1. */
#define NUMAGPU_SDMA_WRITE_LINEAR_HEADER_WORDS 4u
/* Words of a fence: header, address low/high, value. */
#define NUMAGPU_SDMA_FENCE_WORDS 4u
/* Words of a trap: header, interrupt context. */
#define NUMAGPU_SDMA_TRAP_WORDS 2u
/* Words of a constant fill: header, destination low/high, value, bytes - 1. */
#define NUMAGPU_SDMA_CONST_FILL_WORDS 5u
/* Words of a poll: header, address low/high, reference, mask, retries << 16 | interval. */
#define NUMAGPU_SDMA_POLL_REGMEM_WORDS 6u
/* Words of an atomic: header, address low/high, operand low/high, comparand low/high, loop interval. */
#define NUMAGPU_SDMA_ATOMIC_WORDS 8u
/* Words of a timestamp: header, then low/high of the address, or for a set of the new time in ns. */
#define NUMAGPU_SDMA_TIMESTAMP_WORDS 3u
/* Words of a sub-window copy: header, of source and then of destination (address low/high, y << 16 | x, (pitch - 1) << 13 | z, slice pitch - 1), (rows - 1) << 16 | columns - 1, slices - 1. */
#define NUMAGPU_SDMA_COPY_SUB_WINDOW_WORDS 0xdu
/* Position of the element's size in a sub-window copy's header (31:29): its bytes are 1 << size. */
#define NUMAGPU_SDMA_WINDOW_ELEMENT_SHIFT 0x1du
/* Largest size of an element: 16 bytes. */
#define NUMAGPU_SDMA_WINDOW_ELEMENT_MAX 4u
/* Bits of a column of a sub-window copy (13:0), and of a row above `WINDOW_Y_SHIFT`. */
#define NUMAGPU_SDMA_WINDOW_XY_MASK 0x3fffu
/* Position of the row (29:16). */
#define NUMAGPU_SDMA_WINDOW_Y_SHIFT 0x10u
/* Bits of a slice (10:0). */
#define NUMAGPU_SDMA_WINDOW_Z_MASK 0x7ffu
/* Position of the pitch - 1, in elements (31:13). */
#define NUMAGPU_SDMA_WINDOW_PITCH_SHIFT 0xdu
/* Bits of the slice pitch - 1, in elements (27:0). */
#define NUMAGPU_SDMA_WINDOW_SLICE_MASK 0xfffffffu
/* Header bit of a poll that polls memory; without it a register is meant, which this device does not have. */
#define NUMAGPU_SDMA_POLL_MEMORY 0x80000000u
/* Position of the comparison in a poll's header (30:28), one of `PollFunction`. */
#define NUMAGPU_SDMA_POLL_FUNCTION_SHIFT 0x1cu
/* Bits of a poll's interval (15:0). The encoding publishes no unit; this device counts microseconds. */
#define NUMAGPU_SDMA_POLL_INTERVAL_MASK 0xffffu
/* Position of a poll's retries (27:16): tries after the first. */
#define NUMAGPU_SDMA_POLL_RETRIES_SHIFT 0x10u
/* Bits of a poll's retries, and the value that stands for no end of them, as user-mode drivers use it. */
#define NUMAGPU_SDMA_POLL_RETRIES_MASK 0xfffu
/* Header bit of an atomic that is tried again until its comparison holds; for compare-and-swap only. */
#define NUMAGPU_SDMA_ATOMIC_LOOP 0x10000u
/* Position of the operation in an atomic's header (31:25). */
#define NUMAGPU_SDMA_ATOMIC_OP_SHIFT 0x19u
/* Bit of the operation that makes it work on 64 bits. */
#define NUMAGPU_SDMA_ATOMIC_WIDE 0x20u
/* Bit of the operation that asks for no return value. The copy queue returns none either way. */
#define NUMAGPU_SDMA_ATOMIC_NO_RETURN 0x40u
/* Bits of an atomic's loop interval (12:0), in microseconds as `POLL_INTERVAL_MASK`. */
#define NUMAGPU_SDMA_ATOMIC_INTERVAL_MASK 0x1fffu
/* Bits of the byte count of a copy and a fill (SDMA 4.x: 21:0). */
#define NUMAGPU_SDMA_COUNT_MASK 0x3fffffu
/* Largest copy or fill in one packet, in bytes. */
#define NUMAGPU_SDMA_MAX_COPY 0x400000u
/* Bits of the word count of a linear write (19:0). */
#define NUMAGPU_SDMA_WRITE_COUNT_MASK 0xfffffu
/* Bits of a trap's interrupt context (27:0). */
#define NUMAGPU_SDMA_TRAP_CONTEXT_MASK 0xfffffffu
/* Position of the fill size in a constant fill's header (31:30): 0 = bytes, 2 = words. */
#define NUMAGPU_SDMA_FILL_SIZE_SHIFT 0x1eu

/* IDENTITY, BAR 0: what the device is */
#define NUMAGPU_BLOCK_IDENTITY_BAR 0u
#define NUMAGPU_BLOCK_IDENTITY_BASE 0u
#define NUMAGPU_BLOCK_IDENTITY_STRIDE 0x100u
#define NUMAGPU_BLOCK_IDENTITY_COUNT 1u
/* IDENTITY_MAGIC: `NGPU` in ASCII; RO */
#define NUMAGPU_IDENTITY_MAGIC 0u
#define NUMAGPU_IDENTITY_MAGIC_BYTES 4u
#define NUMAGPU_IDENTITY_MAGIC_RESET 0x5550474eu
/* IDENTITY_VERSION: register map version, major << 16 | minor; RO */
#define NUMAGPU_IDENTITY_VERSION 4u
#define NUMAGPU_IDENTITY_VERSION_BYTES 4u
#define NUMAGPU_IDENTITY_VERSION_RESET 0x20001u
/* IDENTITY_CAPS: capability bits; RO */
#define NUMAGPU_IDENTITY_CAPS 8u
#define NUMAGPU_IDENTITY_CAPS_BYTES 8u
/* IDENTITY_GPU_INDEX: index of this GPU in the machine; RO */
#define NUMAGPU_IDENTITY_GPU_INDEX 0x10u
#define NUMAGPU_IDENTITY_GPU_INDEX_BYTES 4u
/* IDENTITY_PARTITION_COUNT: HBM partitions, 0 = none; RO */
#define NUMAGPU_IDENTITY_PARTITION_COUNT 0x14u
#define NUMAGPU_IDENTITY_PARTITION_COUNT_BYTES 4u
/* IDENTITY_QUEUE_COUNT: copy queues; RO */
#define NUMAGPU_IDENTITY_QUEUE_COUNT 0x18u
#define NUMAGPU_IDENTITY_QUEUE_COUNT_BYTES 4u
/* IDENTITY_VECTOR_COUNT: MSI-X vectors; RO */
#define NUMAGPU_IDENTITY_VECTOR_COUNT 0x1cu
#define NUMAGPU_IDENTITY_VECTOR_COUNT_BYTES 4u
/* IDENTITY_DOORBELL_STRIDE: bytes between the doorbells of two queues; RO */
#define NUMAGPU_IDENTITY_DOORBELL_STRIDE 0x20u
#define NUMAGPU_IDENTITY_DOORBELL_STRIDE_BYTES 4u
#define NUMAGPU_IDENTITY_DOORBELL_STRIDE_RESET 8u
/* IDENTITY_SCRATCH: free for the driver, cleared by reset; RW */
#define NUMAGPU_IDENTITY_SCRATCH 0x24u
#define NUMAGPU_IDENTITY_SCRATCH_BYTES 4u
#define NUMAGPU_IDENTITY_SCRATCH_WRITABLE 0xffffffffu
/* IDENTITY_PACKETS: bit `n`: copy queues have opcode `n`; RO */
#define NUMAGPU_IDENTITY_PACKETS 0x28u
#define NUMAGPU_IDENTITY_PACKETS_BYTES 8u

/* BOOT, BAR 0: boot handshake */
#define NUMAGPU_BLOCK_BOOT_BAR 0u
#define NUMAGPU_BLOCK_BOOT_BASE 0x100u
#define NUMAGPU_BLOCK_BOOT_STRIDE 0x100u
#define NUMAGPU_BLOCK_BOOT_COUNT 1u
/* BOOT_CONTROL: bit 0: start; ignored unless STATUS is RESET; RW 0x1, acts */
#define NUMAGPU_BOOT_CONTROL 0x100u
#define NUMAGPU_BOOT_CONTROL_BYTES 4u
#define NUMAGPU_BOOT_CONTROL_WRITABLE 1u
/* BOOT_STATUS: 0 RESET, 1 BOOTING, 2 READY, 3 FAULT; RO */
#define NUMAGPU_BOOT_STATUS 0x104u
#define NUMAGPU_BOOT_STATUS_BYTES 4u
/* BOOT_FAULT: boot fault code, 0 = none; RO */
#define NUMAGPU_BOOT_FAULT 0x108u
#define NUMAGPU_BOOT_FAULT_BYTES 4u
/* BOOT_DELAY_US: modelled boot time in microseconds; RO */
#define NUMAGPU_BOOT_DELAY_US 0x10cu
#define NUMAGPU_BOOT_DELAY_US_BYTES 4u

/* IRQ, BAR 0: interrupt causes */
#define NUMAGPU_BLOCK_IRQ_BAR 0u
#define NUMAGPU_BLOCK_IRQ_BASE 0x200u
#define NUMAGPU_BLOCK_IRQ_STRIDE 0x100u
#define NUMAGPU_BLOCK_IRQ_COUNT 1u
/* IRQ_STATUS: pending causes, write ones to clear; W1C */
#define NUMAGPU_IRQ_STATUS 0x200u
#define NUMAGPU_IRQ_STATUS_BYTES 4u
#define NUMAGPU_IRQ_STATUS_W1C 0xffffffffu
/* IRQ_ENABLE: causes that send an MSI-X message; RW */
#define NUMAGPU_IRQ_ENABLE 0x204u
#define NUMAGPU_IRQ_ENABLE_BYTES 4u
#define NUMAGPU_IRQ_ENABLE_WRITABLE 0xffffffffu
/* IRQ_RAISED: MSI-X messages sent since reset; RO */
#define NUMAGPU_IRQ_RAISED 0x208u
#define NUMAGPU_IRQ_RAISED_BYTES 8u

/* CLOCK, BAR 0: device clock */
#define NUMAGPU_BLOCK_CLOCK_BAR 0u
#define NUMAGPU_BLOCK_CLOCK_BASE 0x300u
#define NUMAGPU_BLOCK_CLOCK_STRIDE 0x100u
#define NUMAGPU_BLOCK_CLOCK_COUNT 1u
/* CLOCK_NS: nanoseconds since the device was created; RO */
#define NUMAGPU_CLOCK_NS 0x300u
#define NUMAGPU_CLOCK_NS_BYTES 8u
/* CLOCK_MODE: what time stamps of queues mean: 0 Off, 1 Modelled, 2 Paced; RO */
#define NUMAGPU_CLOCK_MODE 0x308u
#define NUMAGPU_CLOCK_MODE_BYTES 4u

/* TOPOLOGY, BAR 0: place in the machine */
#define NUMAGPU_BLOCK_TOPOLOGY_BAR 0u
#define NUMAGPU_BLOCK_TOPOLOGY_BASE 0x400u
#define NUMAGPU_BLOCK_TOPOLOGY_STRIDE 0x100u
#define NUMAGPU_BLOCK_TOPOLOGY_COUNT 1u
/* TOPOLOGY_HIVE_ID: id of the hive, 0 = none; RO */
#define NUMAGPU_TOPOLOGY_HIVE_ID 0x400u
#define NUMAGPU_TOPOLOGY_HIVE_ID_BYTES 8u
/* TOPOLOGY_NODE_ID: position in the hive, from 0; RO */
#define NUMAGPU_TOPOLOGY_NODE_ID 0x408u
#define NUMAGPU_TOPOLOGY_NODE_ID_BYTES 4u
/* TOPOLOGY_HIVE_SIZE: GPUs in the hive, this one included; RO */
#define NUMAGPU_TOPOLOGY_HIVE_SIZE 0x40cu
#define NUMAGPU_TOPOLOGY_HIVE_SIZE_BYTES 4u
/* TOPOLOGY_CPU_PXM: proximity domain of the attached CPU node; RO */
#define NUMAGPU_TOPOLOGY_CPU_PXM 0x410u
#define NUMAGPU_TOPOLOGY_CPU_PXM_BYTES 4u
/* TOPOLOGY_LINK_COUNT: LINK entries in use; RO */
#define NUMAGPU_TOPOLOGY_LINK_COUNT 0x414u
#define NUMAGPU_TOPOLOGY_LINK_COUNT_BYTES 4u
/* TOPOLOGY_PARTITION_MODE: partitions now, 0 = none; RO */
#define NUMAGPU_TOPOLOGY_PARTITION_MODE 0x418u
#define NUMAGPU_TOPOLOGY_PARTITION_MODE_BYTES 4u
/* TOPOLOGY_PARTITION_MODES: bit `n`: `n` partitions are possible; RO */
#define NUMAGPU_TOPOLOGY_PARTITION_MODES 0x41cu
#define NUMAGPU_TOPOLOGY_PARTITION_MODES_BYTES 4u
/* TOPOLOGY_PARTITION_REQUEST: partitions after the next reset, 0 = as now; RW, acts */
#define NUMAGPU_TOPOLOGY_PARTITION_REQUEST 0x420u
#define NUMAGPU_TOPOLOGY_PARTITION_REQUEST_BYTES 4u
#define NUMAGPU_TOPOLOGY_PARTITION_REQUEST_WRITABLE 0xffffffffu

/* RAS, BAR 0: memory errors and retired pages */
#define NUMAGPU_BLOCK_RAS_BAR 0u
#define NUMAGPU_BLOCK_RAS_BASE 0x500u
#define NUMAGPU_BLOCK_RAS_STRIDE 0x100u
#define NUMAGPU_BLOCK_RAS_COUNT 1u
/* RAS_CORRECTABLE: correctable errors since reset; RO */
#define NUMAGPU_RAS_CORRECTABLE 0x500u
#define NUMAGPU_RAS_CORRECTABLE_BYTES 4u
/* RAS_UNCORRECTABLE: uncorrectable errors since reset; RO */
#define NUMAGPU_RAS_UNCORRECTABLE 0x504u
#define NUMAGPU_RAS_UNCORRECTABLE_BYTES 4u
/* RAS_POISONED: pages with an uncorrectable error in them; RO */
#define NUMAGPU_RAS_POISONED 0x508u
#define NUMAGPU_RAS_POISONED_BYTES 4u
/* RAS_RETIRED: retired pages; resets keep them; RO */
#define NUMAGPU_RAS_RETIRED 0x50cu
#define NUMAGPU_RAS_RETIRED_BYTES 4u
/* RAS_LAST_ADDRESS: address of the last error; RO */
#define NUMAGPU_RAS_LAST_ADDRESS 0x510u
#define NUMAGPU_RAS_LAST_ADDRESS_BYTES 8u
/* RAS_LAST_KIND: kind of the last error; RO */
#define NUMAGPU_RAS_LAST_KIND 0x518u
#define NUMAGPU_RAS_LAST_KIND_BYTES 4u
/* RAS_COMMAND: 1 RETIRE the page at ADDRESS; reads 0; RW, hidden, acts */
#define NUMAGPU_RAS_COMMAND 0x51cu
#define NUMAGPU_RAS_COMMAND_BYTES 4u
#define NUMAGPU_RAS_COMMAND_WRITABLE 0xffffffffu
/* RAS_ADDRESS: address that the next command is about; RW */
#define NUMAGPU_RAS_ADDRESS 0x520u
#define NUMAGPU_RAS_ADDRESS_BYTES 8u
#define NUMAGPU_RAS_ADDRESS_WRITABLE 0xffffffffffffffffull
/* RAS_RESULT: result of the last command; RO */
#define NUMAGPU_RAS_RESULT 0x528u
#define NUMAGPU_RAS_RESULT_BYTES 4u
/* RAS_INDEX: which retired page ENTRY shows; RW */
#define NUMAGPU_RAS_INDEX 0x52cu
#define NUMAGPU_RAS_INDEX_BYTES 4u
#define NUMAGPU_RAS_INDEX_WRITABLE 0xffffffffu
/* RAS_ENTRY: address of retired page INDEX, all ones = no such page; RO */
#define NUMAGPU_RAS_ENTRY 0x530u
#define NUMAGPU_RAS_ENTRY_BYTES 8u

/* DISCOVERY, BAR 0: blocks of this device */
#define NUMAGPU_BLOCK_DISCOVERY_BAR 0u
#define NUMAGPU_BLOCK_DISCOVERY_BASE 0x600u
#define NUMAGPU_BLOCK_DISCOVERY_STRIDE 0x10u
#define NUMAGPU_BLOCK_DISCOVERY_COUNT 0x10u
/* DISCOVERY_BLOCK: which block, 0 = end of the list; RO */
#define NUMAGPU_DISCOVERY_BLOCK(i) (0x600u + 0x10u * (i))
#define NUMAGPU_DISCOVERY_BLOCK_BYTES 4u
/* DISCOVERY_OFFSET: offset of its first instance; RO */
#define NUMAGPU_DISCOVERY_OFFSET(i) (0x604u + 0x10u * (i))
#define NUMAGPU_DISCOVERY_OFFSET_BYTES 4u
/* DISCOVERY_STRIDE: bytes between its instances; RO */
#define NUMAGPU_DISCOVERY_STRIDE(i) (0x608u + 0x10u * (i))
#define NUMAGPU_DISCOVERY_STRIDE_BYTES 4u
/* DISCOVERY_COUNT: instances in use on this device; RO */
#define NUMAGPU_DISCOVERY_COUNT(i) (0x60cu + 0x10u * (i))
#define NUMAGPU_DISCOVERY_COUNT_BYTES 4u

/* LINK, BAR 0: links to peers and to the CPU */
#define NUMAGPU_BLOCK_LINK_BAR 0u
#define NUMAGPU_BLOCK_LINK_BASE 0x800u
#define NUMAGPU_BLOCK_LINK_STRIDE 0x40u
#define NUMAGPU_BLOCK_LINK_COUNT 0x20u
/* LINK_PEER: hive position of the peer, 0xffffffff = the CPU; RO */
#define NUMAGPU_LINK_PEER(i) (0x800u + 0x40u * (i))
#define NUMAGPU_LINK_PEER_BYTES 4u
/* LINK_STATE: 0 Absent, 1 Up, 2 Down, 3 Degraded; RO */
#define NUMAGPU_LINK_STATE(i) (0x804u + 0x40u * (i))
#define NUMAGPU_LINK_STATE_BYTES 4u
/* LINK_WIDTH: physical links in parallel; RO */
#define NUMAGPU_LINK_WIDTH(i) (0x808u + 0x40u * (i))
#define NUMAGPU_LINK_WIDTH_BYTES 4u
/* LINK_BANDWIDTH_MBS: MB/s in one direction, 0 = not known; RO */
#define NUMAGPU_LINK_BANDWIDTH_MBS(i) (0x80cu + 0x40u * (i))
#define NUMAGPU_LINK_BANDWIDTH_MBS_BYTES 4u
/* LINK_LATENCY_NS: latency in ns, 0 = not known; RO */
#define NUMAGPU_LINK_LATENCY_NS(i) (0x810u + 0x40u * (i))
#define NUMAGPU_LINK_LATENCY_NS_BYTES 4u
/* LINK_ERRORS: errors since reset; RO */
#define NUMAGPU_LINK_ERRORS(i) (0x814u + 0x40u * (i))
#define NUMAGPU_LINK_ERRORS_BYTES 4u
/* LINK_WIDTH_NOW: physical links that are up now; RO */
#define NUMAGPU_LINK_WIDTH_NOW(i) (0x818u + 0x40u * (i))
#define NUMAGPU_LINK_WIDTH_NOW_BYTES 4u
/* LINK_BANDWIDTH_NOW_MBS: MB/s in one direction with the links that are up, 0 = not known or down; RO */
#define NUMAGPU_LINK_BANDWIDTH_NOW_MBS(i) (0x81cu + 0x40u * (i))
#define NUMAGPU_LINK_BANDWIDTH_NOW_MBS_BYTES 4u
/* LINK_BYTES_OUT: bytes that left since reset; RO */
#define NUMAGPU_LINK_BYTES_OUT(i) (0x820u + 0x40u * (i))
#define NUMAGPU_LINK_BYTES_OUT_BYTES 8u
/* LINK_BYTES_IN: bytes that came since reset; RO */
#define NUMAGPU_LINK_BYTES_IN(i) (0x828u + 0x40u * (i))
#define NUMAGPU_LINK_BYTES_IN_BYTES 8u

/* PARTITION, BAR 0: HBM range, coherent attach, ownership */
#define NUMAGPU_BLOCK_PARTITION_BAR 0u
#define NUMAGPU_BLOCK_PARTITION_BASE 0x2000u
#define NUMAGPU_BLOCK_PARTITION_STRIDE 0x100u
#define NUMAGPU_BLOCK_PARTITION_COUNT 8u
/* PARTITION_HBM_BASE: first address, as packets name it; RO */
#define NUMAGPU_PARTITION_HBM_BASE(i) (0x2000u + 0x100u * (i))
#define NUMAGPU_PARTITION_HBM_BASE_BYTES 8u
/* PARTITION_HBM_SIZE: bytes; RO */
#define NUMAGPU_PARTITION_HBM_SIZE(i) (0x2008u + 0x100u * (i))
#define NUMAGPU_PARTITION_HBM_SIZE_BYTES 8u
/* PARTITION_PXM: proximity domain, 0xffffffff = none; RO */
#define NUMAGPU_PARTITION_PXM(i) (0x2010u + 0x100u * (i))
#define NUMAGPU_PARTITION_PXM_BYTES 4u
/* PARTITION_COHERENCE: whether the VMM maps this HBM at HBM_BASE, and if not, why; RO */
#define NUMAGPU_PARTITION_COHERENCE(i) (0x2014u + 0x100u * (i))
#define NUMAGPU_PARTITION_COHERENCE_BYTES 4u
/* PARTITION_STATE: 0 FREE, 1 CLAIMED, 2 RELEASING, 3 FAULTED; RO */
#define NUMAGPU_PARTITION_STATE(i) (0x2018u + 0x100u * (i))
#define NUMAGPU_PARTITION_STATE_BYTES 4u
/* PARTITION_GENERATION: counts claims and frees; RO */
#define NUMAGPU_PARTITION_GENERATION(i) (0x201cu + 0x100u * (i))
#define NUMAGPU_PARTITION_GENERATION_BYTES 4u
/* PARTITION_TOKEN: token of the commanding driver; reads 0, cleared by each command; RW, hidden */
#define NUMAGPU_PARTITION_TOKEN(i) (0x2020u + 0x100u * (i))
#define NUMAGPU_PARTITION_TOKEN_BYTES 8u
#define NUMAGPU_PARTITION_TOKEN_WRITABLE 0xffffffffffffffffull
/* PARTITION_COMMAND: 1 CLAIM, 2 RELEASE, 3 TRANSFER, 4 RENEW; reads 0; RW, hidden, acts */
#define NUMAGPU_PARTITION_COMMAND(i) (0x2028u + 0x100u * (i))
#define NUMAGPU_PARTITION_COMMAND_BYTES 4u
#define NUMAGPU_PARTITION_COMMAND_WRITABLE 0xffffffffu
/* PARTITION_RESULT: result of the last command; RO */
#define NUMAGPU_PARTITION_RESULT(i) (0x202cu + 0x100u * (i))
#define NUMAGPU_PARTITION_RESULT_BYTES 4u
/* PARTITION_NEW_TOKEN: token of the next owner, for TRANSFER; reads 0; RW, hidden */
#define NUMAGPU_PARTITION_NEW_TOKEN(i) (0x2030u + 0x100u * (i))
#define NUMAGPU_PARTITION_NEW_TOKEN_BYTES 8u
#define NUMAGPU_PARTITION_NEW_TOKEN_WRITABLE 0xffffffffffffffffull
/* PARTITION_LEASE_MS: lease that CLAIM, TRANSFER and RENEW begin, in ms; 0 = without end; RW */
#define NUMAGPU_PARTITION_LEASE_MS(i) (0x2038u + 0x100u * (i))
#define NUMAGPU_PARTITION_LEASE_MS_BYTES 4u
#define NUMAGPU_PARTITION_LEASE_MS_WRITABLE 0xffffffffu
/* PARTITION_LEASE_LEFT_MS: ms left of the lease, 0xffffffff = without end, 0 = no owner; RO */
#define NUMAGPU_PARTITION_LEASE_LEFT_MS(i) (0x203cu + 0x100u * (i))
#define NUMAGPU_PARTITION_LEASE_LEFT_MS_BYTES 4u
/* PARTITION_LOSS: why an owner last lost the partition without asking; RO */
#define NUMAGPU_PARTITION_LOSS(i) (0x2040u + 0x100u * (i))
#define NUMAGPU_PARTITION_LOSS_BYTES 4u
/* PARTITION_HISTORY_COUNT: steps remembered; RO */
#define NUMAGPU_PARTITION_HISTORY_COUNT(i) (0x2044u + 0x100u * (i))
#define NUMAGPU_PARTITION_HISTORY_COUNT_BYTES 4u
/* PARTITION_HISTORY_INDEX: which step the next two show, 0 = the newest; RW */
#define NUMAGPU_PARTITION_HISTORY_INDEX(i) (0x2048u + 0x100u * (i))
#define NUMAGPU_PARTITION_HISTORY_INDEX_BYTES 4u
#define NUMAGPU_PARTITION_HISTORY_INDEX_WRITABLE 0xffffffffu
/* PARTITION_HISTORY_STEP: state before (7:0), event (15:8), state after (23:16); 0 = no such step; RO */
#define NUMAGPU_PARTITION_HISTORY_STEP(i) (0x204cu + 0x100u * (i))
#define NUMAGPU_PARTITION_HISTORY_STEP_BYTES 4u
/* PARTITION_HISTORY_NS: `CLOCK.NS` of the step; RO */
#define NUMAGPU_PARTITION_HISTORY_NS(i) (0x2050u + 0x100u * (i))
#define NUMAGPU_PARTITION_HISTORY_NS_BYTES 8u

/* QUEUE, BAR 0: copy queues */
#define NUMAGPU_BLOCK_QUEUE_BAR 0u
#define NUMAGPU_BLOCK_QUEUE_BASE 0x8000u
#define NUMAGPU_BLOCK_QUEUE_STRIDE 0x100u
#define NUMAGPU_BLOCK_QUEUE_COUNT 8u
/* QUEUE_RING_BASE: address of the ring, a multiple of 256; RW 0xffffffffffffff00 */
#define NUMAGPU_QUEUE_RING_BASE(i) (0x8000u + 0x100u * (i))
#define NUMAGPU_QUEUE_RING_BASE_BYTES 8u
#define NUMAGPU_QUEUE_RING_BASE_WRITABLE 0xffffffffffffff00ull
/* QUEUE_RING_SIZE: bytes of the ring, a power of two from 256 to 16 MiB; RW */
#define NUMAGPU_QUEUE_RING_SIZE(i) (0x8008u + 0x100u * (i))
#define NUMAGPU_QUEUE_RING_SIZE_BYTES 4u
#define NUMAGPU_QUEUE_RING_SIZE_WRITABLE 0xffffffffu
/* QUEUE_CONTROL: bit 0: enable; bit 1: reset, reads 0; RW 0x3, acts */
#define NUMAGPU_QUEUE_CONTROL(i) (0x800cu + 0x100u * (i))
#define NUMAGPU_QUEUE_CONTROL_BYTES 4u
#define NUMAGPU_QUEUE_CONTROL_WRITABLE 3u
/* QUEUE_TOKEN: token the queue acts for; reads 0; RW, hidden */
#define NUMAGPU_QUEUE_TOKEN(i) (0x8010u + 0x100u * (i))
#define NUMAGPU_QUEUE_TOKEN_BYTES 8u
#define NUMAGPU_QUEUE_TOKEN_WRITABLE 0xffffffffffffffffull
/* QUEUE_RPTR_WRITEBACK: address to which RPTR is written, 0 = nowhere; RW 0xfffffffffffffff8 */
#define NUMAGPU_QUEUE_RPTR_WRITEBACK(i) (0x8018u + 0x100u * (i))
#define NUMAGPU_QUEUE_RPTR_WRITEBACK_BYTES 8u
#define NUMAGPU_QUEUE_RPTR_WRITEBACK_WRITABLE 0xfffffffffffffff8ull
/* QUEUE_RPTR: bytes consumed since enable, not wrapped; RO */
#define NUMAGPU_QUEUE_RPTR(i) (0x8020u + 0x100u * (i))
#define NUMAGPU_QUEUE_RPTR_BYTES 8u
/* QUEUE_WPTR: bytes produced, as the last doorbell said; RO */
#define NUMAGPU_QUEUE_WPTR(i) (0x8028u + 0x100u * (i))
#define NUMAGPU_QUEUE_WPTR_BYTES 8u
/* QUEUE_STATUS: 0 DISABLED, 1 IDLE, 2 RUNNING, 3 FAULT; RO */
#define NUMAGPU_QUEUE_STATUS(i) (0x8030u + 0x100u * (i))
#define NUMAGPU_QUEUE_STATUS_BYTES 4u
/* QUEUE_FAULT_CODE: why the queue stopped, 0 = it did not; RO */
#define NUMAGPU_QUEUE_FAULT_CODE(i) (0x8034u + 0x100u * (i))
#define NUMAGPU_QUEUE_FAULT_CODE_BYTES 4u
/* QUEUE_FAULT_ADDR: address that the fault is about; RO */
#define NUMAGPU_QUEUE_FAULT_ADDR(i) (0x8038u + 0x100u * (i))
#define NUMAGPU_QUEUE_FAULT_ADDR_BYTES 8u
/* QUEUE_FAULT_PACKET: index of the packet since enable; RO */
#define NUMAGPU_QUEUE_FAULT_PACKET(i) (0x8040u + 0x100u * (i))
#define NUMAGPU_QUEUE_FAULT_PACKET_BYTES 8u
/* QUEUE_PACKETS: packets completed since enable; RO */
#define NUMAGPU_QUEUE_PACKETS(i) (0x8048u + 0x100u * (i))
#define NUMAGPU_QUEUE_PACKETS_BYTES 8u
/* QUEUE_PRIORITY: 0 lowest to 3 highest; taken over when the queue is enabled; RW 0x3 */
#define NUMAGPU_QUEUE_PRIORITY(i) (0x8050u + 0x100u * (i))
#define NUMAGPU_QUEUE_PRIORITY_BYTES 4u
#define NUMAGPU_QUEUE_PRIORITY_WRITABLE 3u
/* QUEUE_TRAP_CONTEXT: context of the last TRAP; RO */
#define NUMAGPU_QUEUE_TRAP_CONTEXT(i) (0x8054u + 0x100u * (i))
#define NUMAGPU_QUEUE_TRAP_CONTEXT_BYTES 4u
/* QUEUE_BUSY_NS: ns that packets took since enable, as `CLOCK.MODE` says; RO */
#define NUMAGPU_QUEUE_BUSY_NS(i) (0x8058u + 0x100u * (i))
#define NUMAGPU_QUEUE_BUSY_NS_BYTES 8u
/* QUEUE_STAMP_START_NS: when the last packet that moved data began; RO */
#define NUMAGPU_QUEUE_STAMP_START_NS(i) (0x8060u + 0x100u * (i))
#define NUMAGPU_QUEUE_STAMP_START_NS_BYTES 8u
/* QUEUE_STAMP_END_NS: when it ended; RO */
#define NUMAGPU_QUEUE_STAMP_END_NS(i) (0x8068u + 0x100u * (i))
#define NUMAGPU_QUEUE_STAMP_END_NS_BYTES 8u
/* QUEUE_WPTR_POLL: address of the write pointer that a kick reads, 0 = nowhere; taken over when the queue is enabled; RW 0xfffffffffffffff8 */
#define NUMAGPU_QUEUE_WPTR_POLL(i) (0x8070u + 0x100u * (i))
#define NUMAGPU_QUEUE_WPTR_POLL_BYTES 8u
#define NUMAGPU_QUEUE_WPTR_POLL_WRITABLE 0xfffffffffffffff8ull

/* DOORBELL, BAR 2: doorbells of the copy queues */
#define NUMAGPU_BLOCK_DOORBELL_BAR 2u
#define NUMAGPU_BLOCK_DOORBELL_BASE 0u
#define NUMAGPU_BLOCK_DOORBELL_STRIDE 8u
#define NUMAGPU_BLOCK_DOORBELL_COUNT 8u
/* DOORBELL_WPTR: write pointer in bytes; writing the low half rings; RW, hidden, acts */
#define NUMAGPU_DOORBELL_WPTR(i) (0u + 8u * (i))
#define NUMAGPU_DOORBELL_WPTR_BYTES 8u
#define NUMAGPU_DOORBELL_WPTR_WRITABLE 0xffffffffffffffffull

/* KICK, BAR 2: doorbells without a value */
#define NUMAGPU_BLOCK_KICK_BAR 2u
#define NUMAGPU_BLOCK_KICK_BASE 0x800u
#define NUMAGPU_BLOCK_KICK_STRIDE 8u
#define NUMAGPU_BLOCK_KICK_COUNT 8u
/* KICK_KICK: writing anything: the queue reads its write pointer from WPTR_POLL; RW, hidden, acts */
#define NUMAGPU_KICK_KICK(i) (0x800u + 8u * (i))
#define NUMAGPU_KICK_KICK_BYTES 4u
#define NUMAGPU_KICK_KICK_WRITABLE 0xffffffffu

/* MSIX, BAR 1: MSI-X table, kept for VMMs that do not emulate it */
#define NUMAGPU_BLOCK_MSIX_BAR 1u
#define NUMAGPU_BLOCK_MSIX_BASE 0u
#define NUMAGPU_BLOCK_MSIX_STRIDE 0x10u
#define NUMAGPU_BLOCK_MSIX_COUNT 9u
/* MSIX_ADDRESS: message address; RW 0xfffffffffffffffc */
#define NUMAGPU_MSIX_ADDRESS(i) (0u + 0x10u * (i))
#define NUMAGPU_MSIX_ADDRESS_BYTES 8u
#define NUMAGPU_MSIX_ADDRESS_WRITABLE 0xfffffffffffffffcull
/* MSIX_DATA: message data; RW */
#define NUMAGPU_MSIX_DATA(i) (8u + 0x10u * (i))
#define NUMAGPU_MSIX_DATA_BYTES 4u
#define NUMAGPU_MSIX_DATA_WRITABLE 0xffffffffu
/* MSIX_CONTROL: bit 0: masked; RW 0x1 */
#define NUMAGPU_MSIX_CONTROL(i) (0xcu + 0x10u * (i))
#define NUMAGPU_MSIX_CONTROL_BYTES 4u
#define NUMAGPU_MSIX_CONTROL_WRITABLE 1u
#define NUMAGPU_MSIX_CONTROL_RESET 1u

/* Bits of `IDENTITY.CAPS`. */
/* CPUs reach the HBM coherently: it is memory of the guest's physical address space (exposure `spm`), or its aperture is coherent (exposure `bar`). */
#define NUMAGPU_CAPS_COHERENT_HBM 1u
/* Queues reach the HBM of the other GPUs of the hive. */
#define NUMAGPU_CAPS_PEER_COPY 2u
/* CPUs reach the HBM through `BAR_APERTURE` (exposures `bar` and `private`); `HBM_BASE` is then an address of the device's own. */
#define NUMAGPU_CAPS_HBM_APERTURE 4u
/* The number of partitions can be changed, by `TOPOLOGY.PARTITION_REQUEST`. */
#define NUMAGPU_CAPS_PARTITION_MODES 8u
/* Time stamps are those of a model, see `CLOCK.MODE`. */
#define NUMAGPU_CAPS_MODELLED_TIME 0x10u
/* Queues have `kick` and `QUEUE.WPTR_POLL`; not where VMMs map the doorbells. */
#define NUMAGPU_CAPS_KICKS 0x20u

/* Bits of `IRQ.STATUS` and `IRQ.ENABLE`. */
/* A queue stopped with a fault; vector `VECTOR_EVENTS`. */
#define NUMAGPU_IRQ_BITS_FAULT 1u
/* A partition changed hands without its owner asking; vector `VECTOR_EVENTS`. */
#define NUMAGPU_IRQ_BITS_OWNERSHIP 2u
/* A memory error, see the `RAS` block; vector `VECTOR_EVENTS`. */
#define NUMAGPU_IRQ_BITS_RAS 4u
/* A link changed its state or its width; vector `VECTOR_EVENTS`. */
#define NUMAGPU_IRQ_BITS_LINK 8u
/* Queue 0 executed a TRAP packet; vector `VECTOR_QUEUE0`. Queue `q` has bit `8 + q`. */
#define NUMAGPU_IRQ_BITS_QUEUE0 0x100u

/* `BOOT.STATUS`. */
/* Waiting for the driver's START. */
#define NUMAGPU_BOOT_STATE_RESET 0u
/* On its way. */
#define NUMAGPU_BOOT_STATE_BOOTING 1u
/* Every block works. */
#define NUMAGPU_BOOT_STATE_READY 2u
/* Failed; a function-level reset gives another try. */
#define NUMAGPU_BOOT_STATE_FAULT 3u

/* `CLOCK.MODE`. */
/* Time stamps are the host's time; work goes as fast as the host does it. */
#define NUMAGPU_TIMING_MODE_OFF 0u
/* Time stamps are what the machine's bandwidths and latencies give; work goes as fast as the host does it. */
#define NUMAGPU_TIMING_MODE_MODELLED 1u
/* The same, and work also takes that long. */
#define NUMAGPU_TIMING_MODE_PACED 2u

/* `DISCOVERY.BLOCK`. */
/* No more blocks. */
#define NUMAGPU_BLOCK_ID_END 0u
/* `IDENTITY`. */
#define NUMAGPU_BLOCK_ID_IDENTITY 1u
/* `BOOT`. */
#define NUMAGPU_BLOCK_ID_BOOT 2u
/* `IRQ`. */
#define NUMAGPU_BLOCK_ID_IRQ 3u
/* `CLOCK`. */
#define NUMAGPU_BLOCK_ID_CLOCK 4u
/* `TOPOLOGY`. */
#define NUMAGPU_BLOCK_ID_TOPOLOGY 5u
/* `RAS`. */
#define NUMAGPU_BLOCK_ID_RAS 6u
/* `DISCOVERY`. */
#define NUMAGPU_BLOCK_ID_DISCOVERY 7u
/* `LINK`. */
#define NUMAGPU_BLOCK_ID_LINK 8u
/* `PARTITION`. */
#define NUMAGPU_BLOCK_ID_PARTITION 9u
/* `QUEUE`. */
#define NUMAGPU_BLOCK_ID_QUEUE 0xau

/* `LINK.STATE`. */
/* No such link. */
#define NUMAGPU_LINK_STATE_ABSENT 0u
/* All its lanes carry traffic. */
#define NUMAGPU_LINK_STATE_UP 1u
/* No lane does. */
#define NUMAGPU_LINK_STATE_DOWN 2u
/* Some of its lanes do. */
#define NUMAGPU_LINK_STATE_DEGRADED 3u

/* `RAS.LAST_KIND`. */
/* No error since power-on. */
#define NUMAGPU_RAS_KIND_NONE 0u
/* Corrected; the data is good. */
#define NUMAGPU_RAS_KIND_CORRECTABLE 1u
/* Not corrected; who reads the data through a queue gets a fault, until it is written anew. */
#define NUMAGPU_RAS_KIND_UNCORRECTABLE 2u

/* `RAS.COMMAND`. */
/* Takes the page at `ADDRESS` out of use for good. */
#define NUMAGPU_RAS_COMMAND_RETIRE 1u

/* `RAS.RESULT`. */
/* No command since reset. */
#define NUMAGPU_RAS_RESULT_NONE 0u
/* Done, or done before. */
#define NUMAGPU_RAS_RESULT_OK 1u
/* Refused: `ADDRESS` is in no partition of this GPU. */
#define NUMAGPU_RAS_RESULT_OUT_OF_RANGE 2u
/* Refused: the list of retired pages is full. */
#define NUMAGPU_RAS_RESULT_FULL 3u
/* Refused: no such command. */
#define NUMAGPU_RAS_RESULT_BAD_COMMAND 4u

/* `PARTITION.COHERENCE`. */
/* The VMM maps nothing at the planned address. */
#define NUMAGPU_COHERENCE_NOT_MAPPED 0u
/* The VMM maps exactly this HBM's backing memory there. */
#define NUMAGPU_COHERENCE_COHERENT 1u
/* The VMM maps memory without a file descriptor there, so the device cannot tell what it is. */
#define NUMAGPU_COHERENCE_NO_FD 2u
/* The VMM maps another file there. */
#define NUMAGPU_COHERENCE_OTHER_FILE 3u
/* The right file, at another offset. */
#define NUMAGPU_COHERENCE_OTHER_OFFSET 4u
/* Only a part of the range is mapped. */
#define NUMAGPU_COHERENCE_PARTIAL 5u
/* Mapped without write permission. */
#define NUMAGPU_COHERENCE_READ_ONLY 6u
/* Reached through the aperture, not mapped by the VMM; nothing to judge, and claims are allowed. */
#define NUMAGPU_COHERENCE_APERTURE 7u

/* `PARTITION.STATE`. */
/* Nobody's; holds zeros. */
#define NUMAGPU_OWNER_STATE_FREE 0u
/* One driver's. */
#define NUMAGPU_OWNER_STATE_CLAIMED 1u
/* Being scrubbed. */
#define NUMAGPU_OWNER_STATE_RELEASING 2u
/* Unusable until reset. */
#define NUMAGPU_OWNER_STATE_FAULTED 3u

/* `PARTITION.COMMAND`. */
/* Makes the driver that `TOKEN` names the owner of a free partition. */
#define NUMAGPU_OWNER_COMMAND_CLAIM 1u
/* Gives the partition back; it is scrubbed before it is free. */
#define NUMAGPU_OWNER_COMMAND_RELEASE 2u
/* Makes `NEW_TOKEN` the owner; contents stay. */
#define NUMAGPU_OWNER_COMMAND_TRANSFER 3u
/* Begins the owner's lease anew, for `LEASE_MS` from now. */
#define NUMAGPU_OWNER_COMMAND_RENEW 4u

/* `PARTITION.RESULT`. */
/* No command since reset. */
#define NUMAGPU_OWNER_RESULT_NONE 0u
/* Done. */
#define NUMAGPU_OWNER_RESULT_OK 1u
/* Refused: claimed by another driver, or by this one already. */
#define NUMAGPU_OWNER_RESULT_BUSY 2u
/* Refused: `TOKEN` is not the owner's. */
#define NUMAGPU_OWNER_RESULT_NOT_OWNER 3u
/* Refused: `BOOT.STATUS` is not READY. */
#define NUMAGPU_OWNER_RESULT_NOT_READY 4u
/* Refused: the VMM does not map this HBM where the plan says; see `COHERENCE`. */
#define NUMAGPU_OWNER_RESULT_NOT_COHERENT 5u
/* Refused: token 0 is nobody's. */
#define NUMAGPU_OWNER_RESULT_BAD_TOKEN 6u
/* Refused: the partition is faulted. */
#define NUMAGPU_OWNER_RESULT_FAULTED 7u
/* Refused: being scrubbed; try again. */
#define NUMAGPU_OWNER_RESULT_RELEASING 8u
/* Refused: no such command. */
#define NUMAGPU_OWNER_RESULT_BAD_COMMAND 9u

/* `PARTITION.LOSS`. */
/* No owner lost it since power-on. */
#define NUMAGPU_OWNER_LOSS_NONE 0u
/* A function-level reset. */
#define NUMAGPU_OWNER_LOSS_FUNCTION_RESET 1u
/* A hot reset of the bus. */
#define NUMAGPU_OWNER_LOSS_HOT_RESET 2u
/* The function's bus master bit was cleared. */
#define NUMAGPU_OWNER_LOSS_BUS_MASTER_OFF 3u
/* The lease ended. */
#define NUMAGPU_OWNER_LOSS_LEASE_EXPIRED 4u
/* The number of partitions changed. */
#define NUMAGPU_OWNER_LOSS_PARTITION_CHANGE 5u
/* The VMM went away. */
#define NUMAGPU_OWNER_LOSS_DISCONNECT 6u

/* What happened, in `PARTITION.HISTORY_STEP`: a command with its circumstances already judged, or an incident. */
/* CLAIM with a token, while booted and coherent. */
#define NUMAGPU_OWNER_EVENT_CLAIM 1u
/* CLAIM with token 0. */
#define NUMAGPU_OWNER_EVENT_CLAIM_BAD_TOKEN 2u
/* CLAIM before the boot is over. */
#define NUMAGPU_OWNER_EVENT_CLAIM_NOT_READY 3u
/* CLAIM while the VMM does not map this HBM where the plan says. */
#define NUMAGPU_OWNER_EVENT_CLAIM_NOT_COHERENT 4u
/* RELEASE with the owner's token. */
#define NUMAGPU_OWNER_EVENT_RELEASE 5u
/* RELEASE with another token. */
#define NUMAGPU_OWNER_EVENT_RELEASE_BY_OTHER 6u
/* TRANSFER with the owner's token, to a token. */
#define NUMAGPU_OWNER_EVENT_TRANSFER 7u
/* TRANSFER with another token. */
#define NUMAGPU_OWNER_EVENT_TRANSFER_BY_OTHER 8u
/* TRANSFER with the owner's token, to token 0. */
#define NUMAGPU_OWNER_EVENT_TRANSFER_BAD_TOKEN 9u
/* RENEW with the owner's token. */
#define NUMAGPU_OWNER_EVENT_RENEW 0xau
/* RENEW with another token. */
#define NUMAGPU_OWNER_EVENT_RENEW_BY_OTHER 0xbu
/* A command that does not exist. */
#define NUMAGPU_OWNER_EVENT_BAD_COMMAND 0xcu
/* A function-level reset. */
#define NUMAGPU_OWNER_EVENT_FUNCTION_RESET 0xdu
/* A hot reset of the bus. */
#define NUMAGPU_OWNER_EVENT_HOT_RESET 0xeu
/* The function's bus master bit was cleared. */
#define NUMAGPU_OWNER_EVENT_BUS_MASTER_OFF 0xfu
/* The lease ended. */
#define NUMAGPU_OWNER_EVENT_LEASE_EXPIRED 0x10u
/* The number of partitions changes. */
#define NUMAGPU_OWNER_EVENT_PARTITION_CHANGE 0x11u
/* The VMM went away. */
#define NUMAGPU_OWNER_EVENT_DISCONNECT 0x12u
/* The scrubber is done. */
#define NUMAGPU_OWNER_EVENT_SCRUBBED 0x13u
/* The scrubber failed. */
#define NUMAGPU_OWNER_EVENT_SCRUB_FAILED 0x14u
/* What the VMM left in it stays: so it was asked of the server. */
#define NUMAGPU_OWNER_EVENT_KEPT 0x15u

/* `QUEUE.STATUS`. */
/* Not enabled. */
#define NUMAGPU_QUEUE_STATE_DISABLED 0u
/* Enabled, nothing to do. */
#define NUMAGPU_QUEUE_STATE_IDLE 1u
/* Working. */
#define NUMAGPU_QUEUE_STATE_RUNNING 2u
/* Stopped by a fault; `CONTROL` reset recovers it. */
#define NUMAGPU_QUEUE_STATE_FAULT 3u

/* `QUEUE.FAULT_CODE`. */
/* It did not stop. */
#define NUMAGPU_QUEUE_FAULT_NONE 0u
/* Opcode or sub-opcode that the engine does not have. */
#define NUMAGPU_QUEUE_FAULT_BAD_OPCODE 1u
/* A field out of its range, such as a misaligned fence. */
#define NUMAGPU_QUEUE_FAULT_BAD_FIELD 2u
/* Nothing is mapped at the address, or not all of the length, or not for writing. */
#define NUMAGPU_QUEUE_FAULT_UNMAPPED 3u
/* HBM that the queue's token does not own. */
#define NUMAGPU_QUEUE_FAULT_NOT_OWNED 4u
/* HBM of a partition that is neither coherently attached nor reached through an aperture. */
#define NUMAGPU_QUEUE_FAULT_NOT_COHERENT 5u
/* The function's bus master bit is off. */
#define NUMAGPU_QUEUE_FAULT_BUS_MASTER_OFF 6u
/* Ring base or size out of range when the queue was enabled. */
#define NUMAGPU_QUEUE_FAULT_BAD_RING 7u
/* A doorbell value behind RPTR, beyond RPTR plus the ring's size, or not a multiple of 4. */
#define NUMAGPU_QUEUE_FAULT_BAD_DOORBELL 8u
/* No link to the peer is up. */
#define NUMAGPU_QUEUE_FAULT_LINK_DOWN 9u
/* The ring ends in the middle of a packet. */
#define NUMAGPU_QUEUE_FAULT_TRUNCATED 0xau
/* A poll used up its retries. */
#define NUMAGPU_QUEUE_FAULT_POLL_TIMEOUT 0xbu
/* HBM with an uncorrectable error in it was read. */
#define NUMAGPU_QUEUE_FAULT_POISONED 0xcu
/* HBM of a page that is retired. */
#define NUMAGPU_QUEUE_FAULT_RETIRED 0xdu

/* How a poll compares memory, after the mask, with its reference; both unsigned. */
/* Holds whatever the memory has. */
#define NUMAGPU_POLL_FUNCTION_ALWAYS 0u
/* Less. */
#define NUMAGPU_POLL_FUNCTION_LESS 1u
/* Less or equal. */
#define NUMAGPU_POLL_FUNCTION_LESS_EQUAL 2u
/* Equal. */
#define NUMAGPU_POLL_FUNCTION_EQUAL 3u
/* Not equal. */
#define NUMAGPU_POLL_FUNCTION_NOT_EQUAL 4u
/* Greater or equal. */
#define NUMAGPU_POLL_FUNCTION_GREATER_EQUAL 5u
/* Greater. */
#define NUMAGPU_POLL_FUNCTION_GREATER 6u

/* Operations of an atomic, without `ATOMIC_WIDE` and `ATOMIC_NO_RETURN`. Source: the `TC_OP` codes of AMD's published Gfx9 command headers; increment and decrement as in the Vega instruction set manual. */
/* Stores the operand. */
#define NUMAGPU_ATOMIC_OP_SWAP 7u
/* Stores the operand if memory has the comparand. */
#define NUMAGPU_ATOMIC_OP_COMPARE_SWAP 8u
/* Adds, wrapping. */
#define NUMAGPU_ATOMIC_OP_ADD 0xfu
/* Subtracts, wrapping. */
#define NUMAGPU_ATOMIC_OP_SUB 0x10u
/* Signed minimum. */
#define NUMAGPU_ATOMIC_OP_MIN_SIGNED 0x11u
/* Unsigned minimum. */
#define NUMAGPU_ATOMIC_OP_MIN_UNSIGNED 0x12u
/* Signed maximum. */
#define NUMAGPU_ATOMIC_OP_MAX_SIGNED 0x13u
/* Unsigned maximum. */
#define NUMAGPU_ATOMIC_OP_MAX_UNSIGNED 0x14u
/* Bitwise and. */
#define NUMAGPU_ATOMIC_OP_AND 0x15u
/* Bitwise or. */
#define NUMAGPU_ATOMIC_OP_OR 0x16u
/* Bitwise exclusive or. */
#define NUMAGPU_ATOMIC_OP_XOR 0x17u
/* Adds one; zero where memory has the operand or more. */
#define NUMAGPU_ATOMIC_OP_INCREMENT 0x18u
/* Subtracts one; the operand where memory has zero or more than the operand. */
#define NUMAGPU_ATOMIC_OP_DECREMENT 0x19u

/* Packets: first words without further bits, and the number of each word */
/* NOP: skips itself and as many words as its header says */
#define NUMAGPU_SDMA_NOP_FIRST 0u
#define NUMAGPU_SDMA_NOP_WORD_HEADER 0u
/* COPY_LINEAR: copies COUNT + 1 bytes */
#define NUMAGPU_SDMA_COPY_LINEAR_FIRST 1u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_HEADER 0u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_COUNT 1u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_PARAMETER 2u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_SOURCE_LO 3u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_SOURCE_HI 4u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_DESTINATION_LO 5u
#define NUMAGPU_SDMA_COPY_LINEAR_WORD_DESTINATION_HI 6u
/* WRITE_LINEAR: writes the COUNT + 1 words that follow */
#define NUMAGPU_SDMA_WRITE_LINEAR_FIRST 2u
#define NUMAGPU_SDMA_WRITE_LINEAR_WORD_HEADER 0u
#define NUMAGPU_SDMA_WRITE_LINEAR_WORD_DESTINATION_LO 1u
#define NUMAGPU_SDMA_WRITE_LINEAR_WORD_DESTINATION_HI 2u
#define NUMAGPU_SDMA_WRITE_LINEAR_WORD_COUNT 3u
/* FENCE: stores a word when all packets before are done */
#define NUMAGPU_SDMA_FENCE_FIRST 5u
#define NUMAGPU_SDMA_FENCE_WORD_HEADER 0u
#define NUMAGPU_SDMA_FENCE_WORD_ADDRESS_LO 1u
#define NUMAGPU_SDMA_FENCE_WORD_ADDRESS_HI 2u
#define NUMAGPU_SDMA_FENCE_WORD_VALUE 3u
/* TRAP: raises the queue's interrupt */
#define NUMAGPU_SDMA_TRAP_FIRST 6u
#define NUMAGPU_SDMA_TRAP_WORD_HEADER 0u
#define NUMAGPU_SDMA_TRAP_WORD_CONTEXT 1u
/* POLL_REGMEM: waits until a word of memory compares as asked */
#define NUMAGPU_SDMA_POLL_REGMEM_FIRST 8u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_HEADER 0u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_ADDRESS_LO 1u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_ADDRESS_HI 2u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_REFERENCE 3u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_MASK 4u
#define NUMAGPU_SDMA_POLL_REGMEM_WORD_RETRIES_INTERVAL 5u
/* ATOMIC: changes 4 or 8 bytes of memory atomically */
#define NUMAGPU_SDMA_ATOMIC_FIRST 0xau
#define NUMAGPU_SDMA_ATOMIC_WORD_HEADER 0u
#define NUMAGPU_SDMA_ATOMIC_WORD_ADDRESS_LO 1u
#define NUMAGPU_SDMA_ATOMIC_WORD_ADDRESS_HI 2u
#define NUMAGPU_SDMA_ATOMIC_WORD_OPERAND_LO 3u
#define NUMAGPU_SDMA_ATOMIC_WORD_OPERAND_HI 4u
#define NUMAGPU_SDMA_ATOMIC_WORD_COMPARAND_LO 5u
#define NUMAGPU_SDMA_ATOMIC_WORD_COMPARAND_HI 6u
#define NUMAGPU_SDMA_ATOMIC_WORD_LOOP_INTERVAL 7u
/* CONST_FILL: fills COUNT + 1 bytes */
#define NUMAGPU_SDMA_CONST_FILL_FIRST 0xbu
#define NUMAGPU_SDMA_CONST_FILL_WORD_HEADER 0u
#define NUMAGPU_SDMA_CONST_FILL_WORD_DESTINATION_LO 1u
#define NUMAGPU_SDMA_CONST_FILL_WORD_DESTINATION_HI 2u
#define NUMAGPU_SDMA_CONST_FILL_WORD_VALUE 3u
#define NUMAGPU_SDMA_CONST_FILL_WORD_COUNT 4u
/* TIMESTAMP_SET: sets the queue's local time */
#define NUMAGPU_SDMA_TIMESTAMP_SET_FIRST 0xdu
#define NUMAGPU_SDMA_TIMESTAMP_SET_WORD_HEADER 0u
#define NUMAGPU_SDMA_TIMESTAMP_SET_WORD_NS_LO 1u
#define NUMAGPU_SDMA_TIMESTAMP_SET_WORD_NS_HI 2u
/* TIMESTAMP_GET: stores the queue's local time */
#define NUMAGPU_SDMA_TIMESTAMP_GET_FIRST 0x10du
#define NUMAGPU_SDMA_TIMESTAMP_GET_WORD_HEADER 0u
#define NUMAGPU_SDMA_TIMESTAMP_GET_WORD_ADDRESS_LO 1u
#define NUMAGPU_SDMA_TIMESTAMP_GET_WORD_ADDRESS_HI 2u
/* TIMESTAMP_GET_GLOBAL: stores the device clock */
#define NUMAGPU_SDMA_TIMESTAMP_GET_GLOBAL_FIRST 0x20du
#define NUMAGPU_SDMA_TIMESTAMP_GET_GLOBAL_WORD_HEADER 0u
#define NUMAGPU_SDMA_TIMESTAMP_GET_GLOBAL_WORD_ADDRESS_LO 1u
#define NUMAGPU_SDMA_TIMESTAMP_GET_GLOBAL_WORD_ADDRESS_HI 2u

#endif
