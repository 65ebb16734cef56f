/*
 * The built-in guest, part 2: says what machine it finds, checks that machine, and powers it off through ACPI.
 *
 * Words on its command line:  status=N  end with exit status N instead of the self-check's result;  idle  sleep for ever
 * instead of powering off;  echo  send console input back until Ctrl-D;  crash  end in a triple fault;  garbage=N  write
 * random values (N is the seed) to every port and to device memory;  quiet  only the last two lines.
 */
#include "tiny.h"

struct trap_frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct gate { u16 offset_low, selector; u8 ist, type; u16 offset_middle; u32 offset_high, reserved; };

struct __attribute__((packed)) tss { u32 reserved0; u64 rsp[3]; u64 reserved1; u64 ist[7]; u64 reserved2; u16 reserved3, iomap; };

#define TIMER_HZ 1000
#define PIT_HZ 1193182
#define WINDOW 0x200000000ull /* a virtual address the identity map leaves free: 8 GiB */

enum { PTE_PRESENT = 1, PTE_WRITE = 2, PTE_USER = 4, PTE_ACCESSED = 0x20, PTE_DIRTY = 0x40 };
#define PTE_NX (1ull << 63)
enum { VECTOR_BP = 3, VECTOR_UD = 6, VECTOR_GP = 13, VECTOR_PF = 14, VECTOR_PIT = 0x20, VECTOR_COM1 = 0x24, VECTOR_APIC = 0x40, VECTOR_USER = 0x80 };

extern u64 gdt[], page_pdpt[], user_return_rsp;
extern char vector_stubs[], user_code[], user_code_end[], leave_user[];
u64 enter_user(u64 rip, u64 rsp);
void tiny_trap(struct trap_frame *frame);
static void power_off(u8 status);

static struct gate idt[256];
static struct tss tss;
static u64 window_directory[512] __attribute__((aligned(4096)));
static volatile u64 window_table[512] __attribute__((aligned(4096)));
static u8 frame_a[4096] __attribute__((aligned(4096))), frame_b[4096] __attribute__((aligned(4096)));
/* Before looking through one mapping at what was written through another. */
#define BARRIER() __asm__ volatile("" : : : "memory")
static u8 trap_stack[8192] __attribute__((aligned(16)));

static volatile u32 *apic;
static volatile u64 pit_ticks, apic_ticks, user_faults;
static volatile u64 fault_resume; /* where an expected fault continues; 0: no fault is expected */
static volatile u64 fault_vector, fault_error, fault_address;
int quiet;
static int failures;

/* --- traps ----------------------------------------------------------------------------------------------------------- */

void tiny_trap(struct trap_frame *frame)
{
    switch (frame->vector) {
    case VECTOR_PIT:
        pit_ticks++; /* fall through */
    case VECTOR_COM1:
        out8(PIC1_COMMAND, 0x20);
        return;
    case VECTOR_APIC:
        apic_ticks++;
        apic[APIC_EOI / 4] = 0;
        return;
    case VECTOR_USER: /* back from enter_user, with the user's RAX as the result */
        frame->cs = 0x08;
        frame->ss = 0x10;
        frame->rip = (u64)leave_user;
        frame->rsp = user_return_rsp;
        frame->rflags = 2;
        return;
    case VECTOR_GP:
        if ((frame->cs & 3) == 3) {
            user_faults++;
            frame->rip++; /* over CLI */
            return;
        }
    }
    fault_vector = frame->vector;
    fault_error = frame->error;
    fault_address = read_cr2();
    if (fault_resume) {
        frame->rip = fault_resume;
        fault_resume = 0;
        return;
    }
    put("tiny: unexpected exception ");
    put_decimal(frame->vector);
    put(", error code ");
    put_hex(frame->error, 0);
    put(", at ");
    put_hex(frame->rip, 0);
    put(", CR2 ");
    put_hex(fault_address, 0);
    put("\n");
    power_off(125);
}

static void set_up_tables(void)
{
    for (int v = 0; v < 256; v++) {
        u64 address = (u64)vector_stubs + 16 * (u64)v;
        idt[v] = (struct gate){ (u16)address, 0x08, 0, 0x8e, (u16)(address >> 16), (u32)(address >> 32), 0 };
    }
    idt[VECTOR_USER].type = 0xee; /* callable from ring 3 */
    idt[VECTOR_PF].ist = 1;       /* an interrupt stack of its own, to exercise that as well */
    struct __attribute__((packed)) { u16 limit; u64 base; } pointer = { sizeof idt - 1, (u64)idt };
    __asm__ volatile("lidt %0" : : "m"(pointer));

    static u8 ring0_stack[4096] __attribute__((aligned(16)));
    u64 base = (u64)&tss;
    tss.rsp[0] = (u64)ring0_stack + sizeof ring0_stack;
    tss.ist[0] = (u64)trap_stack + sizeof trap_stack;
    tss.iomap = sizeof tss;
    gdt[6] = (sizeof tss - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[7] = base >> 32;
    __asm__ volatile("ltr %w0" : : "r"(0x30));
}

static void set_up_interrupts(void)
{
    u32 r[4];
    static const u8 init[] = { 0x11, VECTOR_PIT, 4, 1 }, init2[] = { 0x11, VECTOR_PIT + 8, 2, 1 };
    out8(PIC1_COMMAND, init[0]);
    out8(PIC2_COMMAND, init2[0]);
    for (int i = 1; i < 4; i++) {
        out8(PIC1_DATA, init[i]);
        out8(PIC2_DATA, init2[i]);
    }
    out8(PIC1_DATA, 0xfe); /* IRQ 0 only */
    out8(PIC2_DATA, 0xff);
    cpuid(1, 0, r);
    if (r[3] & 1u << 9) {
        apic = (volatile u32 *)(rdmsr(MSR_APIC_BASE) & 0xfffff000);
        apic[APIC_SVR / 4] = 0x1ff; /* software enable, spurious vector 0xff */
        apic[APIC_LVT0 / 4] = 0x700; /* the PIC's output arrives as ExtINT */
    }
    out8(PIT_COMMAND, 0x34); /* channel 0, low and high byte, mode 2 */
    out8(PIT_CHANNEL0, (PIT_HZ / TIMER_HZ) & 0xff);
    out8(PIT_CHANNEL0, (PIT_HZ / TIMER_HZ) >> 8);
}

/* --- the self-check -------------------------------------------------------------------------------------------------- */

static void check(const char *what, int good)
{
    if (!good)
        failures++;
    if (quiet && good)
        return;
    put("check    ");
    put(what);
    put(good ? ": ok\n" : ": FAILED\n");
}

static int arithmetic(void)
{
    u64 x = 0x9e3779b97f4a7c15, sum = 0;
    for (u32 i = 1; i <= 1000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        sum += x / (2 * i + 1) + x % (2 * i + 1) * i;
    }
    unsigned __int128 product = (unsigned __int128)x * sum;
    u64 folded = (u64)product ^ (u64)(product >> 64);
    u64 rotated = 0x0123456789abcdef;
    u8 carry;
    __asm__("rorq $12, %0\n\tbswapq %0\n\tbtq $0, %0\n\tadcq $0, %0\n\tsetc %1" : "+r"(rotated), "=q"(carry) : : "cc");
    return folded == 0xbd99e9c5f8b5c92 && rotated == 0xbc9a78563412f0de && !carry;
}

static int floating(void)
{
    static const u32 left[4] __attribute__((aligned(16))) = { 1, 0xffffffff, 3, 0x80000000 };
    static const u32 right[4] __attribute__((aligned(16))) = { 2, 1, 39, 0x80000001 };
    u32 sum[4] __attribute__((aligned(16)));
    __asm__ volatile("movdqa %1, %%xmm0\n\tpaddd %2, %%xmm0\n\tmovdqa %%xmm0, %0" : "=m"(sum) : "m"(left), "m"(right));
    u64 seven = 7, six = 6, product;
    __asm__ volatile("fildll %1\n\tfildll %2\n\tfmulp\n\tfistpll %0" : "=m"(product) : "m"(seven), "m"(six));
    return sum[0] == 3 && sum[1] == 0 && sum[2] == 42 && sum[3] == 1 && product == 42;
}

/* Runs one instruction that is expected to fault with `vector`; the error code and CR2 are in fault_*. */
#define FAULTS(vector, instruction, ...)                                                                        \
    ({                                                                                                          \
        fault_vector = ~0ull;                                                                                   \
        __asm__ volatile("leaq 1f(%%rip), %%rax\n\tmovq %%rax, %0\n\t" instruction "\n1:"                       \
                         : "=m"(fault_resume) : __VA_ARGS__ : "rax", "rdx", "memory");                             \
        fault_resume = 0;                                                                                       \
        fault_vector == (vector);                                                                               \
    })

static void map_window(u32 slot, const void *frame, u64 flags)
{
    window_table[slot] = frame ? (u64)frame | flags : 0;
    invlpg(WINDOW + 4096 * (u64)slot);
}

static int paging(void)
{
    volatile u64 *view = (volatile u64 *)WINDOW, *second = view + 512;
    page_pdpt[WINDOW >> 30] = (u64)window_directory | PTE_PRESENT | PTE_WRITE | PTE_USER;
    window_directory[0] = (u64)window_table | PTE_PRESENT | PTE_WRITE | PTE_USER;
    map_window(0, frame_a, PTE_PRESENT | PTE_WRITE);
    map_window(1, frame_b, PTE_PRESENT | PTE_WRITE);
    view[3] = 0x1122334455667788;
    second[3] = 0x99aabbccddeeff00;
    BARRIER();
    int good = ((u64 *)frame_a)[3] == 0x1122334455667788 && ((u64 *)frame_b)[3] == 0x99aabbccddeeff00;
    /* a write that crosses into the other page, which lies elsewhere */
    *(volatile u64 *)(WINDOW + 4092) = 0xa1a2a3a4b1b2b3b4;
    BARRIER();
    good &= *(u32 *)(frame_a + 4092) == 0xb1b2b3b4 && *(u32 *)frame_b == 0xa1a2a3a4;
    good &= (window_table[0] & (PTE_ACCESSED | PTE_DIRTY)) == (PTE_ACCESSED | PTE_DIRTY);
    map_window(0, frame_b, PTE_PRESENT);
    good &= view[3] == 0x99aabbccddeeff00 && (window_table[0] & (PTE_ACCESSED | PTE_DIRTY)) == PTE_ACCESSED;
    return good;
}

static int page_faults(void)
{
    u32 r[4];
    map_window(0, frame_a, PTE_PRESENT);
    int good = FAULTS(VECTOR_PF, "movq %%rcx, (%1)", "r"(WINDOW)) && fault_error == 3 && fault_address == WINDOW;
    map_window(0, NULL, 0);
    good &= FAULTS(VECTOR_PF, "movb 5(%1), %%al", "r"(WINDOW)) && fault_error == 0 && fault_address == WINDOW + 5;
    cpuid(0x80000001, 0, r);
    if (r[3] >> 20 & 1) {
        frame_a[0] = 0xc3;
        map_window(0, frame_a, PTE_PRESENT | PTE_NX);
        /* a jump, not a call: the fault then leaves nothing on the stack */
        good &= FAULTS(VECTOR_PF, "jmp *%1", "r"(WINDOW)) && fault_error == 0x11 && fault_address == WINDOW;
    }
    return good;
}

static int exceptions(void)
{
    int good = FAULTS(VECTOR_UD, "ud2", "r"(0));
    good &= FAULTS(VECTOR_GP, "movw %w1, %%ds", "r"(0x40)) && fault_error == 0x40;
    good &= FAULTS(VECTOR_BP, "int3", "r"(0));
    good &= FAULTS(0, "xorl %%eax, %%eax\n\txorl %%edx, %%edx\n\tdivl %%eax", "r"(0));
    return good;
}

static int self_modifying(void)
{
    static const u8 code[] = { 0xb8, 0x01, 0x00, 0x00, 0x00, 0xc3 }; /* movl $1, %eax; ret */
    u64 sum = 0;
    memcpy(frame_b, code, sizeof code);
    for (u32 i = 1; i <= 100; i++) {
        u32 result;
        frame_b[1] = (u8)i;
        __asm__ volatile("call *%1" : "=a"(result) : "r"(frame_b) : "memory");
        sum += result;
    }
    return sum == 5050;
}

static int user_mode(void)
{
    memcpy(frame_a, user_code, (size_t)(user_code_end - user_code));
    map_window(0, frame_a, PTE_PRESENT | PTE_USER);
    map_window(1, frame_b, PTE_PRESENT | PTE_WRITE | PTE_USER);
    return enter_user(WINDOW, WINDOW + 8192) == 0x600e && user_faults == 1;
}

static int pit_interrupts(void)
{
    u64 start = pit_ticks;
    while (pit_ticks < start + 5)
        sleep_until_interrupt();
    return 1;
}

static int apic_timer(void)
{
    apic[APIC_TIMER_DIVIDE / 4] = 3; /* by 16 */
    apic[APIC_LVT_TIMER / 4] = VECTOR_APIC;
    apic[APIC_TIMER_INITIAL / 4] = 10000;
    u64 limit = pit_ticks + 2000;
    while (!apic_ticks && pit_ticks < limit)
        sleep_until_interrupt();
    return apic_ticks == 1 && apic[APIC_TIMER_CURRENT / 4] == 0;
}

/* Counts a two-instruction loop for 20 timer ticks. */
static void measure_speed(void)
{
    u64 rounds = 0, start = pit_ticks;
    interrupts_on();
    while (pit_ticks < start + 20) {
        u64 n = 20000;
        __asm__ volatile("1: subq $1, %0\n\tjnz 1b" : "+r"(n) : : "cc");
        rounds++;
    }
    interrupts_off();
    put("speed    about ");
    put_decimal(rounds * 40000 * (TIMER_HZ / 20) / 1000000);
    put(" million simple instructions per second\n");
}

/* --- the end --------------------------------------------------------------------------------------------------------- */

static void echo_input(void)
{
    out8(PIC1_DATA, 0xef); /* IRQ 4 only: no timer while waiting */
    out8(COM1 + UART_IER, 1);
    put("tiny: say something, end with Ctrl-D\n");
    for (;;) {
        while (!(in8(COM1 + UART_LSR) & LSR_DATA_READY))
            sleep_until_interrupt();
        char c = (char)in8(COM1 + UART_DATA);
        if (c == 4)
            break;
        put_char(c == '\r' ? '\n' : c);
    }
    out8(COM1 + UART_IER, 0);
}

static u32 random_state;

static u32 random(void) /* xorshift32 */
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

/* Reads and writes of all sizes. Ports that end or reset the machine, and the console, are left to the last. */
static void write_garbage(u32 seed)
{
    static const u16 last[] = { 0x64, 0x92, 0xcf9, 0x600, 0x601, 0x602, 0x603, 0x604, 0x605 };
    static const u32 windows[] = { 0xc0000000, 0xe0000000, 0xfec00000, 0xfed00000, 0xfee00000, 0xfffff000 };
    random_state = seed | 1;
    interrupts_off();
    for (u32 round = 0; round < 2; round++)
        for (u32 port = 0; port < 0x10000; port++) {
            int held_back = (port >= COM1 - 3 && port < COM1 + 8) || (port >= EXIT_PORT - 3 && port <= EXIT_PORT);
            for (size_t i = 0; i < sizeof last / sizeof *last; i++)
                held_back |= port <= last[i] && port + 3 >= last[i];
            if (held_back || (round && random() % 64))
                continue;
            u32 value = random(), kind = value >> 29;
            switch (kind) {
            case 0: __asm__ volatile("inb %%dx, %%al" : "+a"(value) : "d"(port)); break;
            case 1: __asm__ volatile("inw %%dx, %%ax" : "+a"(value) : "d"(port)); break;
            case 2: __asm__ volatile("inl %%dx, %%eax" : "+a"(value) : "d"(port)); break;
            case 3: __asm__ volatile("outw %%ax, %%dx" : : "a"(value), "d"(port)); break;
            case 4: __asm__ volatile("outl %%eax, %%dx" : : "a"(value), "d"(port)); break;
            default: __asm__ volatile("outb %%al, %%dx" : : "a"(value), "d"(port)); break;
            }
        }
    for (u32 i = 0; i < 6000; i++) {
        u32 value = random(), address = windows[i % (sizeof windows / sizeof *windows)] + (random() & 0xff7);
        switch (value >> 29) {
        case 0: (void)*(volatile u8 *)(u64)address; break;
        case 1: (void)*(volatile u32 *)(u64)address; break;
        case 2: (void)*(volatile u64 *)(u64)address; break;
        case 3: *(volatile u8 *)(u64)address = (u8)value; break;
        case 4: *(volatile u16 *)(u64)address = (u16)value; break;
        case 5: *(volatile u64 *)(u64)address = value; break;
        default: *(volatile u32 *)(u64)(address & ~3u) = value; break;
        }
    }
    put("tiny: the devices have seen garbage\n");
    for (u32 i = 0; i < 1000; i++)
        out8(last[random() % (sizeof last / sizeof *last)], (u8)random());
}

static void power_off(u8 status)
{
    out8(EXIT_PORT, status);
    out16(pm1a_control, (u16)(s5_type << 10 | 0x2000));
    for (;;)
        __asm__ volatile("cli; hlt");
}

void tiny_main(const struct start_info *info)
{
    const char *line = info->cmdline ? (const char *)info->cmdline : "";
    out8(COM1 + UART_IER, 0);
    out8(COM1 + UART_LCR, 0x80); /* divisor 1: 115200 */
    out8(COM1 + UART_DATA, 1);
    out8(COM1 + UART_IER, 0);
    out8(COM1 + UART_LCR, 0x03); /* 8n1 */
    out8(COM1 + UART_FCR, 0x01); /* FIFO on; what was typed ahead stays */
    out8(COM1 + UART_MCR, 0x0b); /* OUT2 lets the interrupt through */
    quiet = option(line, "quiet") != NULL;
    set_up_tables();
    if (!quiet) {
        put("\nThis is nonroot's built-in guest, in 64-bit mode. It looks at its machine:\n\n");
        show_cpu();
        show_memory(info);
        put("cmdline  ");
        put(line);
        put("\n");
    }
    int acpi = show_acpi(info);
    check("start information", info->magic == START_INFO_MAGIC);
    check("ACPI tables", acpi);
    check("integer arithmetic", arithmetic());
    check("x87 and SSE2", floating());
    check("paging", paging());
    check("page faults", page_faults());
    check("exceptions", exceptions());
    check("self-modifying code", self_modifying());
    set_up_interrupts();
    check("user mode", user_mode());
    check("timer interrupts (PIT through the PIC)", pit_interrupts());
    if (apic)
        check("local APIC timer", apic_timer());
    if (!quiet)
        measure_speed();
    if (option(line, "echo"))
        echo_input();
    u8 status = option(line, "status=") ? (u8)number_after(line, "status=") : failures != 0;
    put("tiny nonroot 0.1.0 x86_64");
    put(failures ? ", self-check FAILED\n" : ", self-check passed\n");
    if (option(line, "crash")) {
        struct __attribute__((packed)) { u16 limit; u64 base; } nothing = { 0, 0 };
        __asm__ volatile("lidt %0\n\tud2" : : "m"(nothing));
    }
    if (option(line, "garbage="))
        write_garbage(number_after(line, "garbage="));
    while (option(line, "idle")) {
        out8(PIC1_DATA, 0xff);
        sleep_until_interrupt();
    }
    put("tiny: power off\n");
    power_off(status);
}
