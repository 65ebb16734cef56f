"""Device models in processes of their own: Xen's stub domains.

A domain's own process is its hypervisor. Its device model is another process, which has the domain's memory, the pages
of I/O requests, and the descriptors of its disks, and nothing else.

``model``    the hypervisor's side: starts the process, stands for its devices on the board
``proxies``  what stands there
``process``  the process
``board``    the board that its devices are plugged into: what they ask of it goes to the hypervisor
``serve``    the process's loop
"""
