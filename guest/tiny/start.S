/*
 * The built-in guest, part 1: from the PVH entry point (32-bit, paging off, flat segments, EBX = start info) into long
 * mode, and the interrupt stubs. Everything else is main.c.
 */

        .section .note.Xen, "a", @note
        .balign 4
        .long   4, 8, 18                /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .quad   pvh_entry

#define CR0_PE_MP_ET_NE_WP_PG 0x80010033
#define CR4_PAE_PGE_OSFXSR_OSXMMEXCPT 0x6a0
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define EFER_NXE 0x800

        .section .text.entry, "ax", @progbits
        .code32
        .globl  pvh_entry
pvh_entry:
        cli
        cld
        movl    $stack_top, %esp
        movl    %ebx, %ebp              /* CPUID clobbers EBX */

        /* Identity map 4 GiB with 2 MiB pages. */
        movl    $page_directories, %edi
        movl    $0x83, %eax             /* present, writable, large */
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        jnc     1b
        movl    $page_pdpt, %edi
        movl    $page_directories + 7, %eax
        movl    $4, %ecx
2:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $4096, %eax
        loop    2b
        movl    $page_pdpt + 7, page_pml4

        movl    $CR4_PAE_PGE_OSFXSR_OSXMMEXCPT, %eax
        movl    %eax, %cr4
        movl    $page_pml4, %eax
        movl    %eax, %cr3

        /* No-execute only where CPUID 0x80000001 EDX bit 20 offers it. */
        movl    $0x80000001, %eax
        cpuid
        movl    $MSR_EFER, %ecx
        movl    %edx, %esi
        rdmsr
        orl     $EFER_LME, %eax
        testl   $(1 << 20), %esi
        jz      3f
        orl     $EFER_NXE, %eax
3:      wrmsr
        movl    $CR0_PE_MP_ET_NE_WP_PG, %eax
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $long_mode

        .code64
long_mode:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        xorl    %eax, %eax
        movl    %eax, %fs
        movl    %eax, %gs
        movq    $stack_top, %rsp
        movl    %ebp, %edi
        xorl    %ebp, %ebp
        fninit
        call    tiny_main
4:      cli
        hlt
        jmp     4b

        /*
         * One stub per vector, 16 bytes each, so that vector n starts at vector_stubs + 16 n. The CPU pushes an error
         * code for vectors 8, 10-14, 17, 21, 29 and 30; the others get a zero, so that all frames look alike.
         */
        .text
        .balign 16
        .globl  vector_stubs
vector_stubs:
        .set    vector, 0
        .rept   256
        .balign 16
        .if     !((vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30))
        pushq   $0
        .endif
        pushq   $vector
        jmp     common_stub
        .set    vector, vector + 1
        .endr

common_stub:
        pushq   %rax
        pushq   %rcx
        pushq   %rdx
        pushq   %rbx
        pushq   %rbp
        pushq   %rsi
        pushq   %rdi
        pushq   %r8
        pushq   %r9
        pushq   %r10
        pushq   %r11
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, %rdi
        cld
        call    tiny_trap
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %r11
        popq    %r10
        popq    %r9
        popq    %r8
        popq    %rdi
        popq    %rsi
        popq    %rbp
        popq    %rbx
        popq    %rdx
        popq    %rcx
        popq    %rax
        addq    $16, %rsp
        iretq

        /*
         * u64 enter_user(u64 rip, u64 rsp): runs ring-3 code until it executes INT 0x80; returns its RAX. tiny_trap
         * brings us back by loading user_return_rsp and jumping to leave_user.
         */
        .globl  enter_user
enter_user:
        pushq   %rbx
        pushq   %rbp
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, user_return_rsp
        pushq   $0x23                   /* SS */
        pushq   %rsi                    /* RSP */
        pushq   $0x202                  /* RFLAGS: IF */
        pushq   $0x2b                   /* CS */
        pushq   %rdi                    /* RIP */
        iretq

        .globl  leave_user
leave_user:
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbp
        popq    %rbx
        ret

        /* What runs in ring 3: proves that a privileged instruction faults (the handler skips CLI), then comes back. */
        .globl  user_code
        .globl  user_code_end
user_code:
        movl    $0x600d, %eax
        cli                             /* one byte; #GP in ring 3 */
        addl    $1, %eax
        int     $0x80
        ud2
user_code_end:

        .data
        .balign 16
        .globl  gdt
gdt:
        .quad   0
        .quad   0x00af9b000000ffff      /* 0x08: ring-0 code, 64-bit */
        .quad   0x00cf93000000ffff      /* 0x10: ring-0 data */
        .quad   0x00cffb000000ffff      /* 0x18: ring-3 code, 32-bit (unused) */
        .quad   0x00cff3000000ffff      /* 0x20: ring-3 data */
        .quad   0x00affb000000ffff      /* 0x28: ring-3 code, 64-bit */
        .quad   0, 0                    /* 0x30: the TSS, filled in by main.c */
gdt_pointer:
        .word   8 * 8 - 1
        .quad   gdt

        .bss
        .balign 4096
        .globl  page_pml4
        .globl  page_pdpt
page_pml4:
        .skip   4096
page_pdpt:
        .skip   4096
page_directories:
        .skip   4096 * 4
        .skip   16384
stack_top:
        .globl  user_return_rsp
user_return_rsp:
        .skip   8

        .section .note.GNU-stack, "", @progbits
