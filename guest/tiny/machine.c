/* The built-in guest: what machine it finds: the CPU, memory, ACPI tables. */
#include "tiny.h"

void show_cpu(void)
{
    u32 r[4], text[13];
    char vendor[13] = { 0 };
    cpuid(0, 0, r);
    u32 last = r[0];
    memcpy(vendor, &r[1], 4);
    memcpy(vendor + 4, &r[3], 4);
    memcpy(vendor + 8, &r[2], 4);
    put("cpu      ");
    put(vendor);
    cpuid(0x80000000, 0, r);
    if (r[0] >= 0x80000004) {
        for (u32 i = 0; i < 3; i++)
            cpuid(0x80000002 + i, 0, text + 4 * i);
        text[12] = 0;
        put(", ");
        put((char *)text);
    }
    cpuid(1, 0, r);
    u32 family = (r[0] >> 8 & 15) + (r[0] >> 20 & 255), model = (r[0] >> 4 & 15) | (r[0] >> 12 & 0xf0);
    put(", family ");
    put_decimal(family);
    put(", model ");
    put_decimal(model);
    put("\nfeatures");
    static const struct { u32 leaf; u8 reg, bit; const char *name; } features[] = {
        { 1, 3, 0, "fpu" }, { 1, 3, 6, "pae" }, { 1, 3, 9, "apic" }, { 1, 3, 23, "mmx" }, { 1, 3, 25, "sse" },
        { 1, 3, 26, "sse2" }, { 1, 2, 0, "sse3" }, { 1, 2, 9, "ssse3" }, { 1, 2, 19, "sse4.1" }, { 1, 2, 20, "sse4.2" },
        { 1, 2, 1, "pclmul" }, { 1, 2, 25, "aes" }, { 1, 2, 26, "xsave" }, { 1, 2, 28, "avx" }, { 7, 1, 5, "avx2" },
        { 1, 2, 23, "popcnt" }, { 1, 2, 22, "movbe" }, { 7, 1, 3, "bmi1" }, { 7, 1, 8, "bmi2" }, { 7, 1, 19, "adx" },
        { 1, 2, 17, "pcid" }, { 7, 1, 10, "invpcid" }, { 7, 1, 0, "fsgsbase" }, { 7, 1, 7, "smep" }, { 7, 1, 20, "smap" },
        { 7, 2, 2, "umip" }, { 1, 2, 21, "x2apic" }, { 1, 2, 24, "tsc-deadline" }, { 0x80000001, 3, 20, "nx" },
        { 0x80000001, 3, 26, "1gib-pages" }, { 0x80000001, 3, 27, "rdtscp" }, { 0x80000001, 3, 29, "lm" },
    };
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        if (features[i].leaf == 7 && last < 7)
            continue;
        cpuid(features[i].leaf, 0, r);
        if (r[features[i].reg] >> features[i].bit & 1) {
            put(" ");
            put(features[i].name);
        }
    }
    put("\n");
    cpuid(1, 0, r);
    if (r[2] >> 31) {
        cpuid(0x40000000, 0, r);
        memcpy(vendor, &r[1], 12);
        put("hypervisor ");
        put(vendor);
        put("\n");
    }
    if (last >= 0x15) {
        cpuid(0x15, 0, r);
        if (r[0] && r[1] && r[2]) {
            put("tsc      ");
            put_decimal((u64)r[2] * r[1] / r[0] / 1000);
            put(" kHz\n");
        }
    }
}

u64 show_memory(const struct start_info *info)
{
    static const char *const kinds[] = { "?", "RAM", "reserved", "ACPI", "ACPI NVS", "unusable" };
    const struct memmap_entry *map = (const struct memmap_entry *)info->memmap;
    u64 ram = 0;
    for (u32 i = 0; info->version >= 1 && i < info->memmap_entries && i < 128; i++) {
        put("memory   ");
        put_hex(map[i].base, 9);
        put("-");
        put_hex(map[i].base + map[i].size - 1, 9);
        put(" ");
        put(kinds[map[i].type < 6 ? map[i].type : 0]);
        put("\n");
        if (map[i].type == 1)
            ram += map[i].size;
    }
    put("memory   ");
    put_decimal(ram >> 20);
    put(" MiB of RAM\n");
    return ram;
}

/* --- ACPI: enough to power off ------------------------------------------------------------------------------------ */

u16 pm1a_control;
u8 s5_type;

static int sum_is_zero(const u8 *table, u32 size)
{
    u8 sum = 0;
    while (size--)
        sum = (u8)(sum + *table++);
    return !sum;
}

static u32 read32(const u8 *p) { u32 v; memcpy(&v, p, 4); return v; }
static u64 read64(const u8 *p) { u64 v; memcpy(&v, p, 8); return v; }

/* \_S5 in a DSDT: NameOp '_S5_' PackageOp PkgLength NumElements, then SLP_TYPa as an integer. */
static void find_s5(const u8 *dsdt)
{
    u32 size = read32(dsdt + 4);
    for (u32 i = 36; i + 9 <= size; i++) {
        if (!same((const char *)dsdt + i, "_S5_\x12", 5))
            continue;
        const u8 *p = dsdt + i + 5;
        p += 1 + (*p >> 6); /* PkgLength */
        p += 1;             /* NumElements */
        s5_type = *p == 0x0a ? p[1] : *p; /* BytePrefix, or ZeroOp and OneOp as they are */
        return;
    }
}

/* Walks RSDP -> XSDT or RSDT -> FADT -> DSDT. 0 if something is missing or a checksum is wrong. */
int show_acpi(const struct start_info *info)
{
    const u8 *rsdp = (const u8 *)info->rsdp;
    if (!rsdp || !same((const char *)rsdp, "RSD PTR ", 8) || !sum_is_zero(rsdp, 20))
        return 0;
    int wide = rsdp[15] >= 2 && read64(rsdp + 24);
    const u8 *root = (const u8 *)(wide ? read64(rsdp + 24) : read32(rsdp + 16));
    if (!sum_is_zero(root, read32(root + 4)))
        return 0;
    u32 entry = wide ? 8 : 4, count = (read32(root + 4) - 36) / entry;
    int good = 0;
    if (!quiet)
        put("acpi     ");
    for (u32 i = 0; i < count && i < 32; i++) {
        const u8 *table = (const u8 *)(wide ? read64(root + 36 + 8 * i) : read32(root + 36 + 4 * i));
        char name[6] = { (char)table[0], (char)table[1], (char)table[2], (char)table[3], ' ', 0 };
        if (!quiet)
            put(name);
        if (!sum_is_zero(table, read32(table + 4)))
            return 0;
        if (!same(name, "FACP", 4))
            continue;
        const u8 *dsdt = (const u8 *)(u64)read32(table + 40);
        pm1a_control = (u16)read32(table + 64);
        good = sum_is_zero(dsdt, read32(dsdt + 4));
        find_s5(dsdt);
    }
    if (!quiet)
        put("\n");
    return good;
}
