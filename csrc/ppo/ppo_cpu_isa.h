// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The inner loop of the CPU losses, one instance per instruction set (ppo_cpu_isa.cpp is compiled once for each).
#pragma once
#include "ppo.h"

namespace mmfast {

constexpr int64_t kPpoRun = 4096;  // elements of a task, whatever the number of threads: sums are the same bits for any

// The losses and gradients of elements [run kPpoRun, ..) and the run's sums: loss, the statistics, how many are inside the mask.
using PpoLossRun = void (*)(const PpoLossArgs&, int64_t run, double* sums);
void ppo_loss_run_baseline(const PpoLossArgs&, int64_t run, double* sums);
void ppo_loss_run_avx2(const PpoLossArgs&, int64_t run, double* sums);
void ppo_loss_run_avx512(const PpoLossArgs&, int64_t run, double* sums);
void ppo_loss_run_avx512_bf16(const PpoLossArgs&, int64_t run, double* sums);

}  // namespace mmfast
