/*
 * A guest that means harm, for test_two_domains.py: 32-bit, freestanding, started by PVH, no interrupts, no paging.
 * It calls its hypervisor at random, churns its memory, floods console and XenStore, and fills the rings of its disk
 * and its card with noise, round after round. With "break" on its command line it does worse to the ring of XenStore.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { MEMORY_OP = 12, XEN_VERSION = 17, SCHED_OP = 29, EVENT_OP = 32, HVM_OP = 34 };
enum { XS_DIRECTORY = 1, XS_READ = 2, XS_WATCH = 4, XS_START = 6, XS_WRITE = 11, XS_RM = 13 };
enum { GRANT_GFN = 0x4000, CHURN_GFN = 0x800, CHURN_PAGES = 256, FIRST_REF = 8 };

__asm__(".section .note.Xen, \"a\", @note\n"
        ".long 4, 4, 18\n"
        ".asciz \"Xen\"\n"
        ".long entry\n"
        ".text\n"
        ".globl entry\n"
        "entry: cli; cld\n"
        "movl $stack + 16384, %esp\n"
        "pushl %ebx\n"
        "call guest\n"
        "1: hlt; jmp 1b\n");

u8 stack[16384] __attribute__((aligned(16)));
static u8 pages[4][4096] __attribute__((aligned(4096)));
static u8 noise[4096] __attribute__((aligned(4096)));
static u8 reply[8192]; /* a message has 4112 bytes at most */
static u32 seed = 0x2545f491, request_id, console_port, store_port;
static volatile u8 *console, *store;

static u32 chance(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

static int call(u32 number, u32 a, u32 b, u32 c, u32 d, u32 e)
{
    int result = number;
    __asm__ volatile("vmcall" : "+a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d), "+D"(e) : : "memory");
    return result;
}

static void kick(u32 port)
{
    call(EVENT_OP, 4, (u32)&port, 0, 0, 0);
}

static u32 parameter(u32 index)
{
    struct { u16 domid, pad; u32 index; u64 value; } p = { 0x7ff0, 0, index, 0 };
    call(HVM_OP, 1, (u32)&p, 0, 0, 0);
    return (u32)p.value;
}

static volatile u32 *at(volatile u8 *page, u32 offset)
{
    return (volatile u32 *)(page + offset);
}

/* ── the console ── */

static void put(const char *text, u32 length)
{
    for (u32 i = 0; i < length; i++) {
        u32 produced = *at(console, 3084);
        for (u32 tries = 0; produced - *at(console, 3080) >= 2048 && tries < 1000; tries++)
            kick(console_port);
        console[1024 + produced % 2048] = text[i];
        *at(console, 3084) = produced + 1;
    }
    kick(console_port);
}

static u32 append(char *to, u32 length, const char *text)
{
    while (*text)
        to[length++] = *text++;
    to[length] = 0;
    return length;
}

static u32 number(char *to, u32 length, u32 value)
{
    char digits[12];
    u32 count = 0;
    do
        digits[count++] = '0' + value % 10;
    while (value /= 10);
    while (count)
        to[length++] = digits[--count];
    to[length] = 0;
    return length;
}

static void say(const char *text, u32 value)
{
    char line[80];
    u32 length = number(line, append(line, 0, text), value);
    put(line, append(line, length, "\n"));
}

/* ── XenStore ── */

static int ask(u32 type, const char *a, u32 a_length, const char *b, u32 b_length)
{
    u32 header[4] = { type, ++request_id, 0, a_length + b_length };
    for (u32 i = 0; i < 16 + a_length + b_length; i++) {
        u32 produced = *at(store, 2052);
        while (produced - *at(store, 2048) >= 1024)
            kick(store_port);
        store[produced % 1024] = i < 16 ? ((u8 *)header)[i] : i < 16 + a_length ? a[i - 16] : b[i - 16 - a_length];
        *at(store, 2052) = produced + 1;
    }
    kick(store_port);
    for (;;) {
        u32 got = 0, length = 16;
        while (got < length) {
            u32 consumed = *at(store, 2056);
            if (consumed == *at(store, 2060)) {
                kick(store_port); /* there is room again for a long answer */
                continue;
            }
            reply[got++ & 8191] = store[1024 + consumed % 1024];
            *at(store, 2056) = consumed + 1;
            if (got == 16)
                length = 16 + ((u32 *)reply)[3];
        }
        kick(store_port);
        if (((u32 *)reply)[0] != 15 && ((u32 *)reply)[1] == request_id) { /* no watch event */
            reply[length & 8191] = 0;
            return ((u32 *)reply)[0] == 16 ? -1 : (int)length - 16;
        }
    }
}

static u32 size(const char *text)
{
    u32 length = 0;
    while (text[length])
        length++;
    return length;
}

static const char *read_node(const char *folder, const char *name)
{
    char path[128];
    u32 length = append(path, append(path, 0, folder), name);
    return ask(XS_READ, path, length + 1, 0, 0) < 0 ? "" : (const char *)reply + 16;
}

static void write_node(const char *folder, const char *name, const char *value)
{
    char path[128];
    u32 length = append(path, append(path, 0, folder), name);
    ask(XS_WRITE, path, length + 1, value, size(value));
}

static void write_number(const char *folder, const char *name, u32 value)
{
    char text[12];
    number(text, 0, value);
    write_node(folder, name, text);
}

/* ── a device's ring ── */

static u32 grant(u32 ref, u8 *page)
{
    volatile u8 *entry = (volatile u8 *)((GRANT_GFN << 12) + 8 * ref);
    *at(entry, 4) = (u32)page >> 12;
    *at(entry, 0) = 1; /* permitted to domain 0 */
    return ref;
}

static int backend_is(const char *folder, char first, char second)
{
    char path[128];
    append(path, 0, read_node(folder, "backend"));
    char state = read_node(path, "/state")[0];
    return state == first || state == second;
}

static int wait_for(const char *folder, char first, char second)
{
    for (u32 tries = 0; tries < 3000; tries++)
        if (backend_is(folder, first, second))
            return 1;
    return 0;
}

/* Connect, make noise, be thrown out, start anew. How often it was connected. */
static u32 device(const char *folder, int is_card)
{
    struct { u16 domid, remote; u32 port; } channel = { 0x7ff0, 0, 0 };
    write_node(folder, "state", "6");
    wait_for(folder, '6', '2');
    write_node(folder, "state", "1");
    if (!wait_for(folder, '2', '2'))
        return 0;
    for (u32 i = 0; i < 2; i++)
        for (u32 j = 0; j < 4096; j++)
            pages[2 * is_card + i][j] = 0;
    call(EVENT_OP, 6, (u32)&channel, 0, 0, 0);
    u32 ref = FIRST_REF + 2 * is_card;
    if (is_card) {
        write_number(folder, "tx-ring-ref", grant(ref, pages[2]));
        write_number(folder, "rx-ring-ref", grant(ref + 1, pages[3]));
        write_node(folder, "request-rx-copy", "1");
        write_number(folder, "event-channel", channel.port);
        write_node(folder, "state", "4");
    } else {
        write_number(folder, "ring-ref", grant(ref, pages[0]));
        write_number(folder, "event-channel", channel.port);
        write_node(folder, "protocol", "x86_32-abi");
        write_node(folder, "state", "3");
    }
    if (!wait_for(folder, '4', '4'))
        return 0;
    write_node(folder, "state", "4");
    volatile u8 *ring = pages[2 * is_card];
    for (u32 times = 0; times < 300; times++) {
        for (u32 i = 64; i < 4096; i++)
            ring[i] = chance() >> 8 & (times & 1 ? 0xff : 7);
        if (is_card)
            *at(pages[3], 0) += chance() & 63;
        *at(ring, 0) += chance() & 31;
        kick(channel.port);
    }
    *at(ring, 0) += 0x10000000; /* an index that cannot be */
    kick(channel.port);
    wait_for(folder, '5', '6');
    call(EVENT_OP, 3, (u32)&channel.port, 0, 0, 0);
    return 1;
}

/* ── floods ── */

static void fill(void)
{
    for (u32 i = 0; i < 64; i++)
        ((u32 *)noise)[i] = chance() >> (chance() & 31);
}

static void calls(u32 times)
{
    static const u32 numbers[] = { 12, 13, 15, 17, 18, 20, 21, 24, 29, 32, 34, 0, 36, 127 };
    while (times--) {
        u32 which = numbers[chance() % 14], command = chance() & 31;
        fill();
        if (which == SCHED_OP && command)
            command = 0; /* neither shutdown nor sleep */
        if (which == MEMORY_OP && (command == 1 || command == 7 || command == 15 || command == 23))
            command = 9; /* its own memory goes in churn() */
        if (which == EVENT_OP && (command == 3 || command == 10))
            command = 5; /* its channels stay */
        if (which == HVM_OP && command == 0)
            command = 1;
        if (which == 13) {
            for (u32 i = 0; i < 64; i += 8) {
                u32 *inner = (u32 *)noise + i;
                if (*inner == SCHED_OP || *inner == MEMORY_OP || *inner == EVENT_OP || *inner == HVM_OP)
                    *inner = XEN_VERSION;
            }
            call(which, (u32)noise, chance() & 1 ? chance() & 127 : chance(), 0, 0, 0);
        } else {
            call(which, command, (u32)noise, chance() & 4095, chance(), chance());
        }
    }
}

static void churn(void)
{
    static u32 frames[CHURN_PAGES];
    struct { u32 frames, count, order, flags; u16 domid, pad; } r = { (u32)frames, CHURN_PAGES, 0, 0, 0x7ff0, 0 };
    for (u32 i = 0; i < CHURN_PAGES; i++)
        frames[i] = CHURN_GFN + i;
    call(MEMORY_OP, 1, (u32)&r, 0, 0, 0);
    call(MEMORY_OP, 6, (u32)&r, 0, 0, 0);
}

static void requests(u32 times)
{
    char path[64];
    while (times--) {
        u32 length = number(path, append(path, 0, "data/"), chance() % 2000);
        fill();
        switch (chance() & 7) {
        case 0:
            ask(XS_DIRECTORY, "data", 5, 0, 0);
            break;
        case 1:
            ask(XS_START, "", 1, 0, 0);
            break;
        case 2:
            ask(XS_WATCH, path, length + 1, "mine", 5);
            break;
        case 3:
            ask(chance() % 64, (char *)noise, chance() % 200, 0, 0);
            break;
        case 4:
            ask(XS_RM, path, length + 1, 0, 0);
            break;
        default:
            ask(XS_WRITE, path, length + 1, (char *)noise, chance() % 3000);
        }
    }
}

/* What follows a word on the command line; 0 if the word is not there. */
static const char *told(const char *word, u32 start_info)
{
    const char *line = (const char *)*at((volatile u8 *)start_info, 24);
    for (; *line; line++) {
        u32 i = 0;
        while (word[i] && line[i] == word[i])
            i++;
        if (!word[i])
            return line + i;
    }
    return 0;
}

void guest(u32 start_info)
{
    struct { u16 domid, count; u32 space, index, gfn; } place = { 0x7ff0, 0, 1, 0, GRANT_GFN };
    const char *digits = told("seed=", start_info);
    for (u32 value = 0; digits && *digits >= '0' && *digits <= '9'; seed = (2 * value + 1) * 0x9e3779b1)
        value = value * 10 + *digits++ - '0';
    console = (volatile u8 *)(parameter(17) << 12);
    console_port = parameter(18);
    store = (volatile u8 *)(parameter(1) << 12);
    store_port = parameter(2);
    call(MEMORY_OP, 7, (u32)&place, 0, 0, 0);
    if (told("break", start_info)) {
        say("breaking ", 1);
        for (u32 round = 1;; round++) {
            for (u32 i = 0; i < 1024; i++)
                store[i] = chance();
            *at(store, 2052) = chance();
            *at(store, 2056) = chance();
            kick(store_port);
            for (u32 i = 0; i < 512; i++)
                kick(chance() & 63);
            if (round % 64 == 0)
                say("broke ", round);
        }
    }
    u32 disks = 0, cards = 0;
    for (u32 round = 1;; round++) {
        calls(4000);
        churn();
        for (u32 i = 0; i < 64; i++)
            put((const char *)start_info, 1024);
        requests(200);
        disks += device("device/vbd/51712/", 0);
        cards += device("device/vif/0/", 1);
        say("\ndisks ", disks);
        say("cards ", cards);
        say("round ", round);
    }
}
