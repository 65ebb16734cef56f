/* The built-in guest: the instructions and port addresses that C has no words for. */
#ifndef TINY_HARDWARE_H
#define TINY_HARDWARE_H

#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum {
    PIC1_COMMAND = 0x20, PIC1_DATA = 0x21, PIC2_COMMAND = 0xa0, PIC2_DATA = 0xa1,
    PIT_CHANNEL0 = 0x40, PIT_COMMAND = 0x43,
    EXIT_PORT = 0xf4, /* takes the exit status, as QEMU's isa-debug-exit at that address does */
    COM1 = 0x3f8,
};

enum {
    UART_DATA = 0, UART_IER = 1, UART_FCR = 2, UART_LCR = 3, UART_MCR = 4, UART_LSR = 5,
    LSR_DATA_READY = 0x01, LSR_THR_EMPTY = 0x20,
};

enum { MSR_APIC_BASE = 0x1b };
enum { APIC_EOI = 0xb0, APIC_SVR = 0xf0, APIC_LVT_TIMER = 0x320, APIC_LVT0 = 0x350, APIC_TIMER_INITIAL = 0x380,
       APIC_TIMER_CURRENT = 0x390, APIC_TIMER_DIVIDE = 0x3e0 };

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u16 in16(u16 port) { u16 value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }

static inline void cpuid(u32 leaf, u32 subleaf, u32 r[4])
{
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
}

static inline u64 rdmsr(u32 index)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static inline u64 read_cr2(void) { u64 v; __asm__ volatile("movq %%cr2, %0" : "=r"(v)); return v; }
static inline void invlpg(u64 address) { __asm__ volatile("invlpg (%0)" : : "r"(address) : "memory"); }
static inline void interrupts_on(void) { __asm__ volatile("sti" : : : "memory"); }
static inline void interrupts_off(void) { __asm__ volatile("cli" : : : "memory"); }
static inline void sleep_until_interrupt(void) { __asm__ volatile("sti; hlt; cli" : : : "memory"); }

#endif
